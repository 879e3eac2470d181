"""Interleaving of token embeddings and thoughts, and slot selection; see `kernels.interleave`.

Each program copies one row of h channels. The gradient of the embedding table sums the rows of
equal ids without atomics, so the result is the same in every run. The positions are sorted by id,
and each sequence of equal ids is cut into pieces at multiples of PIECE. `_sum_pieces` sums each
piece in fp32. `_sum_runs` sums the pieces of each id and stores the sum in the table's dtype. Many
programs thus share the work for an id that fills many positions, such as the pause token's. No fp32
buffer of [v, h] is needed.

Masks encode a condition on the row as a number of channels. In Triton's interpreter, combining a
block of booleans with a scalar boolean gives integers, which it then refuses as a mask.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PIECE = tl.constexpr(32)


@triton.jit
def _join(
    out,
    tokens,  # one embedding per token, or the embedding table
    ids,
    thoughts,
    scale,
    num_rows,
    batch,
    slots_per_token,
    hidden,
    IS_TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    inside = channels < hidden
    slot, in_batch = row // batch, row % batch
    token, index = slot // slots_per_token, slot % slots_per_token
    source = token * batch + in_batch
    is_mine = index == 0
    if IS_TABLE:
        source = tl.load(ids + source)
        is_mine = is_mine & (source >= 0) & (source < num_rows)
    of_token = channels < tl.where(is_mine, hidden, 0)
    embedding = tl.load(tokens + source * hidden + channels, mask=of_token, other=0.0)
    thought_row = (token * (slots_per_token - 1) + index - 1) * batch + in_batch
    of_thought = channels < tl.where(index > 0, hidden, 0)
    thought = tl.load(thoughts + thought_row * hidden + channels, mask=of_thought, other=0.0)
    value = embedding.to(tl.float32) * scale + thought.to(tl.float32)  # one of the two is 0
    tl.store(out + row * hidden + channels, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _part(
    joined,
    tokens,
    thoughts,
    batch,
    slots_per_token,
    hidden,
    HAS_TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    inside = channels < hidden
    slot, in_batch = row // batch, row % batch
    token, index = slot // slots_per_token, slot % slots_per_token
    value = tl.load(joined + row * hidden + channels, mask=inside, other=0.0)
    if HAS_TOKENS:
        to = tokens + (token * batch + in_batch) * hidden + channels
        tl.store(to, value, mask=channels < tl.where(index == 0, hidden, 0))
    thought_row = (token * (slots_per_token - 1) + index - 1) * batch + in_batch
    to = thoughts + thought_row * hidden + channels
    tl.store(to, value, mask=channels < tl.where(index > 0, hidden, 0))


@triton.jit
def _select(whole, kept, batch, slots_per_token, first, num_kept, hidden, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    inside = channels < hidden
    slot, in_batch = row // batch, row % batch
    source = (slot // num_kept * slots_per_token + first + slot % num_kept) * batch + in_batch
    value = tl.load(whole + source * hidden + channels, mask=inside, other=0.0)
    tl.store(kept + row * hidden + channels, value, mask=inside)


@triton.jit
def _unselect(whole, kept, batch, slots_per_token, first, num_kept, hidden, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    slot, in_batch = row // batch, row % batch
    number = slot % slots_per_token - first
    num_channels = tl.where((number >= 0) & (number < num_kept), hidden, 0)
    source = (slot // slots_per_token * num_kept + number) * batch + in_batch
    value = tl.load(kept + source * hidden + channels, mask=channels < num_channels, other=0.0)
    tl.store(whole + row * hidden + channels, value, mask=channels < hidden)


@triton.jit
def _sum_pieces(
    gradient,
    ids,
    order,
    pieces,
    num_positions,
    num_rows,
    batch,
    slots_per_token,
    hidden,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * PIECE
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    start = first
    for step in range(0, PIECE):
        position = first + step
        exists = position < num_positions
        row = tl.load(ids + position, mask=exists, other=num_rows)
        before = tl.load(ids + position - 1, mask=exists & (position > first), other=-1)
        after = tl.load(ids + position + 1, mask=position + 1 < num_positions, other=-1)
        is_start = row != before
        start = tl.where(is_start, position, start)
        source = tl.load(order + position, mask=exists, other=0)
        slot = source // batch * slots_per_token
        offset = (slot * batch + source % batch) * hidden
        is_summed = exists & (row < num_rows)
        of_row = channels < tl.where(is_summed, hidden, 0)
        value = tl.load(gradient + offset + channels, mask=of_row, other=0.0)
        total = tl.where(is_start, 0.0, total) + value.to(tl.float32)
        is_end = (row != after) | (position % PIECE == PIECE - 1)
        of_piece = channels < tl.where(is_summed & is_end, hidden, 0)
        tl.store(pieces + start * hidden + channels, total, mask=of_piece)


@triton.jit
def _sum_runs(ids, pieces, out, scale, num_positions, num_rows, hidden, BLOCK: tl.constexpr):
    position = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = channels < hidden
    row = tl.load(ids + position)
    before = tl.load(ids + position - 1, mask=position > 0, other=-1)
    if (row != before) & (row < num_rows):
        total = tl.load(pieces + position * hidden + channels, mask=inside, other=0.0)
        position = (position // PIECE + 1) * PIECE
        following = tl.load(ids + position, mask=position < num_positions, other=-1)
        while following == row:
            total += tl.load(pieces + position * hidden + channels, mask=inside, other=0.0)
            position += PIECE
            following = tl.load(ids + position, mask=position < num_positions, other=-1)
        total = total * scale
        tl.store(out + row * hidden + channels, total.to(out.dtype.element_ty), mask=inside)


def embed_and_interleave(
    token_ids: Tensor, weight: Tensor, thoughts: Tensor | None, scale: float | None, first_row: int
) -> Tensor:
    """Triton version of `kernels.interleave.embed_and_interleave`."""
    return _EmbedAndInterleave.apply(
        token_ids, weight, thoughts, 1.0 if scale is None else scale, first_row
    )


def interleave(token_embeddings: Tensor, thoughts: Tensor) -> Tensor:
    """Triton version of `kernels.interleave.interleave`."""
    return _Interleave.apply(token_embeddings, thoughts)


def select_slots(hidden: Tensor, slots_per_token: int, slots: range) -> Tensor:
    """Triton version of `kernels.interleave.select_slots`, for a strict subset of the slots."""
    return _SelectSlots.apply(hidden, slots_per_token, slots)


class _EmbedAndInterleave(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        token_ids: Tensor,
        weight: Tensor,
        thoughts: Tensor | None,
        scale: float,
        first_row: int,
    ) -> Tensor:
        rows = (token_ids.t() - first_row).contiguous()  # [b, s] -> [s, b]
        num_tokens, batch = rows.shape
        slots_per_token = 1 if thoughts is None else thoughts.size(0) // num_tokens + 1
        ctx.save_for_backward(rows, weight)
        ctx.slots_per_token, ctx.scale, ctx.has_thoughts = (
            slots_per_token,
            scale,
            thoughts is not None,
        )
        out = weight.new_empty(num_tokens * slots_per_token, batch, weight.size(1))
        _launch_join(out, weight, rows, thoughts, scale, slots_per_token)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        gradient = grad_outputs[0].contiguous()
        d_weight = d_thoughts = None
        if ctx.needs_input_grad[1]:
            d_weight = _table_gradient(gradient, rows, weight, ctx.slots_per_token, ctx.scale)
        if ctx.has_thoughts and ctx.needs_input_grad[2]:
            _, d_thoughts = _parts(gradient, ctx.slots_per_token, with_tokens=False)
        return None, d_weight, d_thoughts, None, None


class _Interleave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token_embeddings: Tensor, thoughts: Tensor) -> Tensor:
        num_tokens, batch, hidden = token_embeddings.shape
        ctx.slots_per_token = thoughts.size(0) // num_tokens + 1
        out = thoughts.new_empty(num_tokens * ctx.slots_per_token, batch, hidden)
        _launch_join(out, token_embeddings.contiguous(), None, thoughts, 1.0, ctx.slots_per_token)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return _parts(
            grad_outputs[0].contiguous(), ctx.slots_per_token, with_tokens=ctx.needs_input_grad[0]
        )


class _SelectSlots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, slots_per_token: int, slots: range) -> Tensor:
        num_slots, batch, width = hidden.shape
        ctx.slots_per_token, ctx.slots = slots_per_token, slots
        kept = hidden.new_empty(num_slots // slots_per_token * len(slots), batch, width)
        _launch_select(_select, kept.size(0), hidden.contiguous(), kept, slots_per_token, slots)
        return kept

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        gradient = grad_outputs[0].contiguous()
        num_slots, batch, width = gradient.shape
        whole = gradient.new_empty(num_slots // len(ctx.slots) * ctx.slots_per_token, batch, width)
        _launch_select(_unselect, whole.size(0), whole, gradient, ctx.slots_per_token, ctx.slots)
        return whole, None, None


def _launch_join(
    out: Tensor,
    tokens: Tensor,
    rows: Tensor | None,
    thoughts: Tensor | None,
    scale: float,
    slots_per_token: int,
) -> None:
    """Fill `out` from one embedding per token; or, if `rows` is given, from those table rows."""
    num_slots, batch, hidden = out.shape
    if out.numel():
        _join[(num_slots * batch,)](
            out,
            tokens,
            tokens if rows is None else rows,
            out if thoughts is None else thoughts.contiguous(),
            scale,
            tokens.size(0),
            batch,
            slots_per_token,
            hidden,
            IS_TABLE=rows is not None,
            BLOCK=triton.next_power_of_2(hidden),
        )


def _parts(
    joined: Tensor, slots_per_token: int, *, with_tokens: bool
) -> tuple[Tensor | None, Tensor]:
    """Split slots into token rows (None unless `with_tokens`) and thought rows, contiguous."""
    num_slots, batch, hidden = joined.shape
    num_tokens = num_slots // slots_per_token
    tokens = joined.new_empty(num_tokens, batch, hidden) if with_tokens else None
    thoughts = joined.new_empty(num_slots - num_tokens, batch, hidden)
    if joined.numel():
        _part[(num_slots * batch,)](
            joined,
            thoughts if tokens is None else tokens,
            thoughts,
            batch,
            slots_per_token,
            hidden,
            HAS_TOKENS=with_tokens,
            BLOCK=triton.next_power_of_2(hidden),
        )
    return tokens, thoughts


def _launch_select(
    kernel: Any, num_slots: int, whole: Tensor, kept: Tensor, slots_per_token: int, slots: range
) -> None:
    """Copy between all slots and the kept slots, with one program per output row."""
    _, batch, hidden = whole.shape
    if num_slots * batch:
        kernel[(num_slots * batch,)](
            whole,
            kept,
            batch,
            slots_per_token,
            slots.start,
            len(slots),
            hidden,
            BLOCK=triton.next_power_of_2(hidden),
        )


def _table_gradient(
    gradient: Tensor, rows: Tensor, weight: Tensor, slots_per_token: int, scale: float
) -> Tensor:
    """The table's gradient, from slot 0 of each token in the slot gradient [s * n, b, h]."""
    num_rows, hidden = weight.shape
    d_weight = torch.zeros_like(weight)
    _, batch = rows.shape
    # Rows of other ranks get the id num_rows, so they sort last and are skipped.
    mine = rows.where((rows >= 0) & (rows < num_rows), num_rows).flatten()
    ids, order = mine.sort(stable=True)
    if not ids.numel():
        return d_weight
    pieces = gradient.new_empty((ids.numel(), hidden), dtype=torch.float32)
    block = min(1024, triton.next_power_of_2(hidden))
    num_blocks = triton.cdiv(hidden, block)
    _sum_pieces[(triton.cdiv(ids.numel(), PIECE.value), num_blocks)](
        gradient,
        ids,
        order,
        pieces,
        ids.numel(),
        num_rows,
        batch,
        slots_per_token,
        hidden,
        BLOCK=block,
    )
    _sum_runs[(ids.numel(), num_blocks)](
        ids, pieces, d_weight, scale, ids.numel(), num_rows, hidden, BLOCK=block
    )
    return d_weight
