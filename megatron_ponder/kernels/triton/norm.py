"""RMSNorm and LayerNorm fused with their neighbours; see `kernels.slot_norm`, `kernels.residual`.

A program computes ROWS rows at once: more than one if rows are narrow. A backward program computes
rows_each rows of the whole sequence. It writes dx to the selected rows and zeros to the others, and
accumulates its partial gradients of the parameters. torch sums the partial gradients in a fixed
order, so the result is the same in every run.

One pair of kernels serves three uses:

    selected slots      the other rows are skipped, and their gradient is 0
    residual            the gradient of the residual stream is added to dx; an optional second norm
                        of the same row shares the statistics
    add and norm        the row is hidden + branch (+ bias); it is rounded and stored before it is
                        normed, because the backward loads the rounded row
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ponder.kernels.operands import Branch, NormParameters

MAX_WARPS = 4096
"""Limit on the warps of a backward launch: as many as the registers of a Hopper GPU (132
multiprocessors) can hold at once, at 64 registers per thread. With a second norm or a branch bias a
thread needs up to 101 registers, and the limit is half. More warps would only store more partial
gradients of the parameters."""


@triton.jit
def _forward(
    hidden,
    branch,
    branch_bias,
    weight,
    bias,
    weight_2,
    bias_2,
    total,
    out,
    out_2,
    means,
    inverses,
    num_rows,
    batch,
    slots_per_token,
    first,
    num_kept,
    width,
    eps,
    HAS_BRANCH: tl.constexpr,
    HAS_BRANCH_BIAS: tl.constexpr,
    IS_LAYER_NORM: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, BLOCK)[None, :]
    exists, inside = row < num_rows, channels < width
    of_row = exists[:, None] & inside
    slot, in_batch = row // batch, row % batch
    source = (slot // num_kept * slots_per_token + first + slot % num_kept) * batch + in_batch
    at = row[:, None] * width + channels
    from_hidden = hidden + source[:, None] * width + channels
    x = tl.load(from_hidden, mask=of_row, other=0.0).to(tl.float32)
    if HAS_BRANCH:
        x += tl.load(branch + at, mask=of_row, other=0.0).to(tl.float32)
        if HAS_BRANCH_BIAS:
            x += tl.load(branch_bias + channels, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=of_row)
        x = rounded.to(tl.float32)
    if IS_LAYER_NORM:
        mean = tl.sum(x, axis=1) / width
        x = tl.where(of_row, x - mean[:, None], 0.0)
        tl.store(means + row, mean, mask=exists)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / width + eps)
    tl.store(inverses + row, inverse, mask=exists)
    u = x * inverse[:, None]
    y = u * tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    if IS_LAYER_NORM:
        y += tl.load(bias + channels, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, y.to(out.dtype.element_ty), mask=of_row)
    if HAS_SECOND:
        y = u * tl.load(weight_2 + channels, mask=inside, other=0.0).to(tl.float32)
        if IS_LAYER_NORM:
            y += tl.load(bias_2 + channels, mask=inside, other=0.0).to(tl.float32)
        tl.store(out_2 + at, y.to(out_2.dtype.element_ty), mask=of_row)


@triton.jit
def _backward(
    hidden,
    weight,
    weight_2,
    gradient,
    gradient_2,
    d_residual,
    d_hidden,
    d_parameters,
    means,
    inverses,
    num_rows,
    rows_each,
    batch,
    slots_per_token,
    first,
    num_kept,
    width,
    HAS_RESIDUAL: tl.constexpr,
    HAS_BRANCH_BIAS: tl.constexpr,
    IS_LAYER_NORM: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)[None, :]
    inside = channels < width
    w = tl.load(weight + channels, mask=inside, other=0.0).to(tl.float32)
    if HAS_SECOND:
        w_2 = tl.load(weight_2 + channels, mask=inside, other=0.0).to(tl.float32)
    d_weight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    d_bias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    d_weight_2 = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    d_bias_2 = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    d_branch_bias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for start in range(0, rows_each, ROWS):
        row = program * rows_each + start + tl.arange(0, ROWS)
        exists = (row < num_rows) & (row < (program + 1) * rows_each)
        slot, in_batch = row // batch, row % batch
        index = slot % slots_per_token - first
        is_selected = exists & (index >= 0) & (index < num_kept)
        kept = (slot // slots_per_token * num_kept + index) * batch + in_batch
        of_row = is_selected[:, None] & inside
        of_whole, in_whole = row[:, None] * width + channels, exists[:, None] & inside
        at = kept[:, None] * width + channels
        x = tl.load(hidden + of_whole, mask=of_row, other=0.0).to(tl.float32)
        inverse = tl.load(inverses + kept, mask=is_selected, other=0.0)[:, None]
        if IS_LAYER_NORM:
            x = x - tl.load(means + kept, mask=is_selected, other=0.0)[:, None]
        u = tl.where(of_row, x * inverse, 0.0)
        dy = tl.load(gradient + at, mask=of_row, other=0.0).to(tl.float32)
        g = dy * w
        d_weight += dy * u
        if IS_LAYER_NORM:
            d_bias += dy
        if HAS_SECOND:
            dy = tl.load(gradient_2 + at, mask=of_row, other=0.0).to(tl.float32)
            g += dy * w_2
            d_weight_2 += dy * u
            if IS_LAYER_NORM:
                d_bias_2 += dy
        dx = g - u * (tl.sum(g * u, axis=1) / width)[:, None]
        if IS_LAYER_NORM:
            dx = dx - (tl.sum(g, axis=1) / width)[:, None]
        dx = tl.where(of_row, dx * inverse, 0.0)
        if HAS_RESIDUAL:
            dx += tl.load(d_residual + at, mask=of_row, other=0.0).to(tl.float32)
        if HAS_BRANCH_BIAS:
            d_branch_bias += dx
        tl.store(d_hidden + of_whole, dx.to(d_hidden.dtype.element_ty), mask=in_whole)
    # d_parameters: [given parameters, programs, width], in the order of `_Norm`'s parameters
    columns = tl.arange(0, BLOCK)
    part = d_parameters + program * width + columns
    step = tl.num_programs(0).to(tl.int64) * width
    if HAS_BRANCH_BIAS:
        tl.store(part, tl.sum(d_branch_bias, axis=0), mask=columns < width)
        part += step
    tl.store(part, tl.sum(d_weight, axis=0), mask=columns < width)
    if IS_LAYER_NORM:
        part += step
        tl.store(part, tl.sum(d_bias, axis=0), mask=columns < width)
    if HAS_SECOND:
        part += step
        tl.store(part, tl.sum(d_weight_2, axis=0), mask=columns < width)
        if IS_LAYER_NORM:
            part += step
            tl.store(part, tl.sum(d_bias_2, axis=0), mask=columns < width)


def norm_slots(
    hidden: Tensor,
    slots_per_token: int,
    slots: range,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Triton version of `kernels.slot_norm.norm_slots`."""
    return _Norm.apply(hidden, None, (slots_per_token, slots), eps, False, None, weight, bias)


def norm_beside_residual(
    hidden: Tensor, norms: Sequence[NormParameters], eps: float
) -> tuple[Tensor, ...]:
    """Triton version of `kernels.residual.norm_beside_residual`."""
    parameters = [tensor for norm in norms for tensor in norm]
    return _Norm.apply(hidden, None, (1, range(1)), eps, True, None, *parameters)


def add_and_norm(
    residual: Tensor, branch: Branch, norm: NormParameters, eps: float
) -> tuple[Tensor, Tensor]:
    """Triton version of `kernels.residual.add_and_norm`."""
    x, branch_bias = branch
    return _Norm.apply(residual, x, (1, range(1)), eps, True, branch_bias, *norm)


class _Norm(torch.autograd.Function):
    """One or two norms of `hidden`, or of `hidden` plus a branch.

    With `wants_residual` the first output is the tensor that is normed. `parameters` are the bias
    of the branch, then the weight and bias of one norm or two.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        branch: Tensor | None,
        selection: tuple[int, range],
        eps: float,
        wants_residual: bool,
        *parameters: Tensor | None,
    ) -> Tensor | tuple[Tensor, ...]:
        hidden = hidden.contiguous()
        branch = None if branch is None else branch.contiguous()
        branch_bias, weight, bias, weight_2, bias_2 = (*parameters, None, None)[:5]
        assert weight is not None
        slots_per_token, slots = selection
        num_slots, batch, width = hidden.shape
        num_kept = num_slots // slots_per_token * len(slots)
        outs = [hidden.new_empty(num_kept, batch, width) for _ in parameters[1::2]]
        total = hidden if branch is None else torch.empty_like(branch)
        inverses = hidden.new_empty(num_kept * batch, dtype=torch.float32)
        means = torch.empty_like(inverses) if bias is not None else inverses
        ctx.flags = {
            "HAS_BRANCH_BIAS": branch_bias is not None,
            "IS_LAYER_NORM": bias is not None,
            "HAS_SECOND": weight_2 is not None,
            **_block(width),
        }
        # Unused pointer arguments receive a placeholder tensor.
        _forward[(triton.cdiv(num_kept * batch, ctx.flags["ROWS"]),)](
            hidden,
            _or(branch, hidden),
            _or(branch_bias, weight),
            weight,
            _or(bias, weight),
            _or(weight_2, weight),
            _or(bias_2, weight),
            total,
            outs[0],
            outs[-1],
            means,
            inverses,
            num_kept * batch,
            batch,
            slots_per_token,
            slots.start,
            len(slots),
            width,
            eps,
            HAS_BRANCH=branch is not None,
            **ctx.flags,
        )
        ctx.save_for_backward(total, means, inverses, *parameters)
        ctx.selection, ctx.wants_residual, ctx.has_branch = (
            selection,
            wants_residual,
            branch is not None,
        )
        if not wants_residual:
            return outs[0]
        return total.view_as(total) if branch is None else total, *outs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, means, inverses, *parameters = ctx.saved_tensors
        gradients = [gradient.contiguous() for gradient in grad_outputs]
        d_normed = gradients[ctx.wants_residual :]
        slots_per_token, slots = ctx.selection
        num_slots, batch, width = hidden.shape
        num_rows = num_slots * batch
        rows_each = triton.cdiv(num_rows, _max_programs(**ctx.flags))
        rows_each = max(rows_each, min(num_rows, ctx.flags["ROWS"]))
        num_programs = triton.cdiv(num_rows, rows_each)
        d_hidden = torch.empty_like(hidden)
        given = [parameter for parameter in parameters if parameter is not None]
        parts = hidden.new_empty((len(given), num_programs, width), dtype=torch.float32)
        weight = parameters[1]
        _backward[(num_programs,)](
            hidden,
            weight,
            parameters[-2],
            d_normed[0],
            d_normed[-1],
            gradients[0],
            d_hidden,
            parts,
            means,
            inverses,
            num_rows,
            rows_each,
            batch,
            slots_per_token,
            slots.start,
            len(slots),
            width,
            HAS_RESIDUAL=ctx.wants_residual,
            **ctx.flags,
        )
        sums = iter(parts.sum(dim=1).to(weight.dtype))
        d_parameters = [None if parameter is None else next(sums) for parameter in parameters]
        return d_hidden, d_hidden if ctx.has_branch else None, None, None, None, *d_parameters


def _or(tensor: Tensor | None, placeholder: Tensor) -> Tensor:
    return placeholder if tensor is None else tensor


def _block(width: int) -> dict[str, int]:
    """Launch sizes: blocks of at least 1024 elements, in one row or more, 8 elements per thread."""
    block = triton.next_power_of_2(width)
    rows = max(1, 1024 // block)
    return {"BLOCK": block, "ROWS": rows, "num_warps": min(16, max(4, block // 256))}


def _max_programs(
    *, num_warps: int, HAS_SECOND: bool, HAS_BRANCH_BIAS: bool, **flags: object
) -> int:
    return MAX_WARPS // (2 if HAS_SECOND or HAS_BRANCH_BIAS else 1) // num_warps
