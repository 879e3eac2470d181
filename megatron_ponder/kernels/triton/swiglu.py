"""SwiGLU of a fused gate-up projection, without copying its halves; see `kernels.swiglu`.

A program computes one block of one row. We do not use Liger's kernel for the fused projection. It
moves the same bytes, but it would be a second code path, since machines without Liger need this
one. It also rounds silu(a) to 16 bits before multiplying by b, and puts a whole row, rounded up to
a power of two, in each program.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 1024


@triton.jit
def _forward(x, y, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    a = tl.load(x + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + (row * 2 + 1) * width + columns, mask=inside, other=0.0).to(tl.float32)
    gated = a * tl.sigmoid(a) * b
    tl.store(y + row * width + columns, gated.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(x, gradient, dx, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate, up = row * 2 * width + columns, (row * 2 + 1) * width + columns
    a = tl.load(x + gate, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x + up, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(gradient + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    da = dy * b * s * (1.0 + a * (1.0 - s))
    tl.store(dx + gate, da.to(dx.dtype.element_ty), mask=inside)
    tl.store(dx + up, (dy * a * s).to(dx.dtype.element_ty), mask=inside)


def swiglu(x: Tensor) -> Tensor:
    """Triton version of `kernels.swiglu.swiglu`."""
    return _Swiglu.apply(x)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        y = x.new_empty(*x.shape[:-1], x.size(-1) // 2)
        _launch(_forward, x, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        _launch(_backward, x, grad_outputs[0].contiguous(), dx)
        return dx


def _launch(kernel: Any, x: Tensor, *others: Tensor) -> None:
    """Launch one program per row of x and block of half a row."""
    width = x.size(-1) // 2
    if x.numel():
        block = min(MAX_BLOCK, triton.next_power_of_2(width))
        grid = x.numel() // (2 * width), triton.cdiv(width, block)
        kernel[grid](x, *others, width, BLOCK=block)
