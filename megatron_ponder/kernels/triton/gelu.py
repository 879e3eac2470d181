"""Bias add and GELU, one kernel for the forward and one for the backward; see `kernels.gelu`.

A forward program computes one block of one row. A backward program computes one block of columns
for ROWS_EACH rows, and its partial sum of the bias gradient. torch sums the partial gradients in a
fixed order, so the result is the same in every run.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 1024
ROWS_EACH = 64
"""Rows per backward program. At 64 rows, the fp32 partial bias gradients are 2 / 64 of the size of
a 16-bit tensor; they are stored once and loaded once."""
INVERSE_SQRT_2 = tl.constexpr(math.sqrt(0.5))
INVERSE_SQRT_2_PI = tl.constexpr(1 / math.sqrt(2 * math.pi))
SQRT_8_BY_PI = tl.constexpr(math.sqrt(8 / math.pi))
"""Leading factor of 2 z."""
CUBIC = tl.constexpr(0.044715)
# When multiplying with these constants, write the tensor first: Triton's interpreter does not
# support the other order.


@triton.jit
def _gate(u, IS_TANH: tl.constexpr):
    """The factor P or s in y = u P or y = u s."""
    if IS_TANH:
        return tl.sigmoid((u + u * u * u * CUBIC) * SQRT_8_BY_PI)
    return 0.5 * (1.0 + tl.math.erf(u * INVERSE_SQRT_2))


@triton.jit
def _forward(x, bias, y, width, HAS_BIAS: tl.constexpr, IS_TANH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    u = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        u += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    activated = u * _gate(u, IS_TANH)
    tl.store(y + row * width + columns, activated.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x,
    bias,
    gradient,
    dx,
    d_biases,
    num_rows,
    rows_each,
    width,
    HAS_BIAS: tl.constexpr,
    IS_TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    part = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    d_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    if HAS_BIAS:
        c = tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    for number in range(0, rows_each):
        row = part * rows_each + number
        of_row = columns < tl.where(row < num_rows, width, 0)
        at = row * width + columns
        u = tl.load(x + at, mask=of_row, other=0.0).to(tl.float32)
        dy = tl.load(gradient + at, mask=of_row, other=0.0).to(tl.float32)
        if HAS_BIAS:
            u += c
        gate = _gate(u, IS_TANH)
        if IS_TANH:
            slope = gate * (1.0 - gate) * (1.0 + u * u * 3.0 * CUBIC) * SQRT_8_BY_PI
        else:
            slope = tl.exp(-0.5 * u * u) * INVERSE_SQRT_2_PI
        du = dy * (gate + u * slope)
        tl.store(dx + at, du.to(dx.dtype.element_ty), mask=of_row)
        d_bias += du
    if HAS_BIAS:
        tl.store(d_biases + part * width + columns, d_bias, mask=inside)


def gelu(x: Tensor, bias: Tensor | None, *, is_tanh: bool) -> Tensor:
    """Triton version of `kernels.gelu.gelu`."""
    return _Gelu.apply(x, bias, is_tanh)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, is_tanh: bool) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, bias)
        ctx.is_tanh = is_tanh
        y = torch.empty_like(x)
        width = x.size(-1)
        block = min(MAX_BLOCK, triton.next_power_of_2(width))
        if x.numel():
            _forward[(x.numel() // width, triton.cdiv(width, block))](
                x,
                x if bias is None else bias,
                y,
                width,
                HAS_BIAS=bias is not None,
                IS_TANH=is_tanh,
                BLOCK=block,
            )
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, bias = ctx.saved_tensors
        dx = torch.empty_like(x)
        width = x.size(-1)
        num_rows = x.numel() // width
        num_parts = triton.cdiv(num_rows, ROWS_EACH)
        block = min(MAX_BLOCK, triton.next_power_of_2(width))
        d_biases = x.new_empty((num_parts if bias is not None else 0, width), dtype=torch.float32)
        if x.numel():
            _backward[(num_parts, triton.cdiv(width, block))](
                x,
                x if bias is None else bias,
                grad_outputs[0].contiguous(),
                dx,
                d_biases,
                num_rows,
                min(ROWS_EACH, num_rows),
                width,
                HAS_BIAS=bias is not None,
                IS_TANH=ctx.is_tanh,
                BLOCK=block,
            )
        d_bias = None if bias is None else d_biases.sum(dim=0).to(bias.dtype)
        return dx, d_bias, None
