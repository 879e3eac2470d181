"""In-place rotation of queries and keys in the fused QKV projection; see `kernels.rotary`.

One program handles all heads of one slot of one sequence. It rotates the first 2r channels of each
query and key in place and leaves the values unchanged. All slots of a token use the same row of the
table, slot // slots_per_token; in decoding, each sequence has its own row. Queries, keys and values
are then views of the projection's output. Overwriting that output is safe, because megatron-core's
linear layers save their input for the backward. The heads of a group are adjacent, so all queries
have one stride over heads only if groups have one query each, or if there is one group. Otherwise
the queries are copied, because torch's attention accepts no other layout.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = tl.constexpr(16)
"""Heads that a program rotates at once."""


@triton.jit
def _rotate(
    mixed,
    table,
    batch,
    slots_per_token,
    num_table_rows,
    table_batch,
    num_groups,
    heads_each,
    head_dim,
    half,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK)
    inside = channels < half
    slot, in_batch = row // batch, row % batch
    angle = (
        table + (slot // slots_per_token * table_batch + in_batch % table_batch) * half + channels
    )
    cos = tl.load(angle, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(angle + num_table_rows * half, mask=inside, other=0.0).to(tl.float32)
    row_width = num_groups * (heads_each + 1) * head_dim
    # The heads of a group: its queries, its key, then its value. The value is not rotated.
    for first in range(0, num_groups * heads_each, ROWS):
        number = first + tl.arange(0, ROWS)
        head = number // heads_each * (heads_each + 1) + number % heads_each
        start = mixed + row * row_width + head[:, None] * head_dim + channels[None, :]
        mask = (number[:, None] < num_groups * heads_each) & (channels[None, :] < half)
        x1 = tl.load(start, mask=mask, other=0.0).to(tl.float32)
        x2 = tl.load(start + half, mask=mask, other=0.0).to(tl.float32)
        y1 = x1 * cos[None, :] - x2 * sin[None, :]
        y2 = x2 * cos[None, :] + x1 * sin[None, :]
        tl.store(start, y1.to(mixed.dtype.element_ty), mask=mask)
        tl.store(start + half, y2.to(mixed.dtype.element_ty), mask=mask)


@triton.jit
def _join_and_rotate_back(
    mixed,
    query,
    key,
    value,
    table,
    batch,
    slots_per_token,
    num_table_rows,
    table_batch,
    num_groups,
    heads_each,
    head_dim,
    half,
    query_slot,
    query_batch,
    query_head,
    key_slot,
    key_batch,
    key_head,
    value_slot,
    value_batch,
    value_head,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot, in_batch = row // batch, row % batch
    channels = tl.arange(0, BLOCK)[None, :]
    # The partner of each rotated channel. A channel that is not rotated is its own, at angle 0.
    partner = tl.where(channels < half, channels + half, channels - half)
    partner = tl.where(channels < 2 * half, partner, channels)
    angle = table + (slot // slots_per_token * table_batch + in_batch % table_batch) * half
    angle += tl.where(channels < half, channels, channels - half)
    cos = tl.load(angle, mask=channels < 2 * half, other=1.0).to(tl.float32)
    sin = tl.load(angle + num_table_rows * half, mask=channels < 2 * half, other=0.0)
    # Inverse rotation: x1 = y1 cos + y2 sin; x2 = y2 cos - y1 sin.
    sin = tl.where(channels < half, sin, -sin).to(tl.float32)
    num_queries = heads_each - 1
    query += slot * query_slot + in_batch * query_batch
    key += slot * key_slot + in_batch * key_batch
    value += slot * value_slot + in_batch * value_batch
    num_heads = num_groups * (heads_each + 1)
    for first in range(0, num_heads, ROWS):
        head = first + tl.arange(0, ROWS)[:, None]
        group, number = head // (heads_each + 1), head % (heads_each + 1)
        inside = (head < num_heads) & (channels < head_dim)
        of_query = inside & (number < num_queries)
        of_key = inside & (number == num_queries)
        of_value = inside & (number == heads_each)
        from_query = query + (group * num_queries + number) * query_head
        from_key = key + group * key_head
        # Each head has one of three sources; the other two are masked and give 0.
        g = tl.load(from_query + channels, mask=of_query, other=0.0).to(tl.float32)
        g += tl.load(from_key + channels, mask=of_key, other=0.0).to(tl.float32)
        g = g * cos
        g += tl.load(from_query + partner, mask=of_query, other=0.0).to(tl.float32) * sin
        g += tl.load(from_key + partner, mask=of_key, other=0.0).to(tl.float32) * sin
        from_value = value + group * value_head + channels
        g += tl.load(from_value, mask=of_value, other=0.0).to(tl.float32)
        to = mixed + (row * num_heads + head) * head_dim + channels
        tl.store(to, g.to(mixed.dtype.element_ty), mask=inside)


def split_and_rotate(mixed: Tensor, table: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Triton version of `kernels.rotary.split_and_rotate`; overwrites `mixed`."""
    return _SplitAndRotate.apply(mixed.unflatten(-1, (-1, head_dim)), table)


class _SplitAndRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mixed: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mixed = mixed.contiguous()
        slots, batch, groups, num_heads, d = mixed.shape
        table, half = table.contiguous(), table.size(-1)
        ctx.save_for_backward(table)
        ctx.shape = mixed.shape
        _rotate[(slots * batch,)](
            mixed,
            table,
            batch,
            slots // table.size(1),
            table.size(1) * table.size(2),
            table.size(2),
            groups,
            num_heads - 1,
            d,
            half,
            BLOCK=triton.next_power_of_2(half),
        )
        query, key, value = (
            _part(mixed, first, last)
            for first, last in (
                (0, num_heads - 2),
                (num_heads - 2, num_heads - 1),
                (num_heads - 1, num_heads),
            )
        )
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        slots, batch, groups, num_heads, d = ctx.shape
        query, key, value = (g if g.stride(-1) == 1 else g.contiguous() for g in grad_outputs)
        mixed = query.new_empty(ctx.shape)
        _join_and_rotate_back[(slots * batch,)](
            mixed,
            query,
            key,
            value,
            table,
            batch,
            slots // table.size(1),
            table.size(1) * table.size(2),
            table.size(2),
            groups,
            num_heads - 1,
            d,
            table.size(-1),
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            BLOCK=triton.next_power_of_2(d),
        )
        return mixed, None


def _part(mixed: Tensor, first: int, last: int) -> Tensor:
    """Heads first..last-1 of each group as [slots, b, heads, d]; shares `mixed`'s memory if it can.

    The result is built from the storage, because autograd would track a view of `mixed` as an
    output that aliases the input.
    """
    slots, batch, groups, _, d = mixed.shape
    heads = mixed[:, :, :, first:last]
    if heads.size(3) > 1 and groups > 1:
        return heads.reshape(slots, batch, -1, d)
    stride = heads.stride(2) if groups > 1 else heads.stride(3)
    shape = (slots, batch, groups * heads.size(3), d)
    strides = (heads.stride(0), heads.stride(1), stride, 1)
    out = mixed.new_empty(0)
    return out.set_(mixed.untyped_storage(), heads.storage_offset(), shape, strides)
