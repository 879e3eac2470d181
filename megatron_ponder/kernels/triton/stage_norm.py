"""Norm of the stages that are read; see `kernels.stage_norm`.

A program of the forward norms a row. One of the backward goes over ROWS rows of the whole sequence:
it writes zeros to those that are not read, dx to the others, and keeps its part of the parameters'
gradients, which torch adds up: a sum in fixed order, the same in every run.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_PROGRAMS = 512


@triton.jit
def _forward(
    hidden,
    weight,
    bias,
    out,
    means,
    inverses,
    batch,
    stages,
    first,
    num_kept,
    width,
    eps,
    IS_LAYER_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    inside = channels < width
    slot, in_batch = row // batch, row % batch
    source = (slot // num_kept * stages + first + slot % num_kept) * batch + in_batch
    x = tl.load(hidden + source * width + channels, mask=inside, other=0.0).to(tl.float32)
    if IS_LAYER_NORM:
        mean = tl.sum(x, axis=0) / width
        x = tl.where(inside, x - mean, 0.0)
        tl.store(means + row, mean)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
    tl.store(inverses + row, inverse)
    y = x * inverse * tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    if IS_LAYER_NORM:
        y += tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + channels, y.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    hidden,
    weight,
    gradient,
    d_hidden,
    d_weights,
    d_biases,
    means,
    inverses,
    num_rows,
    rows_each,
    batch,
    stages,
    first,
    num_kept,
    width,
    IS_LAYER_NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    inside = channels < width
    w = tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros((BLOCK,), dtype=tl.float32)
    d_bias = tl.zeros((BLOCK,), dtype=tl.float32)
    for step in range(0, rows_each):
        row = program * rows_each + step
        exists = row < num_rows
        slot, in_batch = row // batch, row % batch
        number = slot % stages - first
        is_read = exists & (number >= 0) & (number < num_kept)
        kept = (slot // stages * num_kept + number) * batch + in_batch
        of_row = channels < tl.where(is_read, width, 0)
        dy = tl.load(gradient + kept * width + channels, mask=of_row, other=0.0).to(tl.float32)
        x = tl.load(hidden + row * width + channels, mask=of_row, other=0.0).to(tl.float32)
        inverse = tl.load(inverses + kept, mask=is_read, other=0.0)
        if IS_LAYER_NORM:
            x = x - tl.load(means + kept, mask=is_read, other=0.0)
        u = tl.where(of_row, x * inverse, 0.0)
        g = dy * w
        dx = g - u * (tl.sum(g * u, axis=0) / width)
        if IS_LAYER_NORM:
            dx = dx - tl.sum(g, axis=0) / width
            d_bias += dy
        dx = tl.where(of_row, dx * inverse, 0.0)
        d_weight += dy * u
        of_whole = channels < tl.where(exists, width, 0)
        to = d_hidden + row * width + channels
        tl.store(to, dx.to(d_hidden.dtype.element_ty), mask=of_whole)
    tl.store(d_weights + program * width + channels, d_weight, mask=inside)
    if IS_LAYER_NORM:
        tl.store(d_biases + program * width + channels, d_bias, mask=inside)


def norm_stages(
    hidden: Tensor,
    num_stages: int,
    stages: range,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    is_layer_norm: bool,
) -> Tensor:
    """As `kernels.stage_norm.norm_stages`."""
    assert is_layer_norm == (bias is not None)
    return _NormStages.apply(hidden, weight, bias, num_stages, stages, eps)


class _NormStages(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        num_stages: int,
        stages: range,
        eps: float,
    ) -> Tensor:
        hidden = hidden.contiguous()
        num_slots, batch, width = hidden.shape
        num_kept = num_slots // num_stages * len(stages)
        out = hidden.new_empty(num_kept, batch, width)
        inverses = hidden.new_empty(num_kept * batch, dtype=torch.float32)
        means = torch.empty_like(inverses) if bias is not None else inverses
        _forward[(num_kept * batch,)](
            hidden,
            weight,
            weight if bias is None else bias,
            out,
            means,
            inverses,
            batch,
            num_stages,
            stages.start,
            len(stages),
            width,
            eps,
            IS_LAYER_NORM=bias is not None,
            BLOCK=triton.next_power_of_2(width),
        )
        ctx.save_for_backward(hidden, weight, means, inverses)
        ctx.num_stages, ctx.stages, ctx.has_bias = num_stages, stages, bias is not None
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, means, inverses = ctx.saved_tensors
        gradient = grad_outputs[0].contiguous()
        num_slots, batch, width = hidden.shape
        num_rows = num_slots * batch
        rows_each = triton.cdiv(num_rows, MAX_PROGRAMS)
        num_programs = triton.cdiv(num_rows, rows_each)
        d_hidden = torch.empty_like(hidden)
        d_weights = hidden.new_empty((num_programs, width), dtype=torch.float32)
        d_biases = torch.empty_like(d_weights) if ctx.has_bias else d_weights
        _backward[(num_programs,)](
            hidden,
            weight,
            gradient,
            d_hidden,
            d_weights,
            d_biases,
            means,
            inverses,
            num_rows,
            rows_each,
            batch,
            ctx.num_stages,
            ctx.stages.start,
            len(ctx.stages),
            width,
            IS_LAYER_NORM=ctx.has_bias,
            BLOCK=triton.next_power_of_2(width),
        )
        d_weight = d_weights.sum(dim=0).to(weight.dtype)
        d_bias = d_biases.sum(dim=0).to(weight.dtype) if ctx.has_bias else None
        return d_hidden, d_weight, d_bias, None, None, None
