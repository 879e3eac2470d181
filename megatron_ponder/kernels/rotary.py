"""Rotary position embedding; every slot of a token has the token's position.

The first 2r channels of a head are x = (x1, x2), r channels each. At a[t, i] = t * base^(-i/r):

    y1 = x1 cos a - x2 sin a
    y2 = x2 cos a + x1 sin a

The other channels are unchanged. The backward rotates by -a. One function with a custom backward
splits the fused QKV projection into queries, keys and values and rotates them. Composed from slices
and concatenations, the same would copy each query and key about six times.

With Triton the rotation is in place in the projection's output, and queries, keys and values are
views of it. The forward loads and stores the rotated elements of q and k once; the backward loads
and stores all elements of q, k and v once. The Triton table has one fp32 row per token, shared by
its slots. The torch table has one row per slot, in the run's dtype.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_ponder.kernels.dispatch import uses_triton


def rotary_table(angles: Tensor, slots_per_token: int, dtype: torch.dtype) -> Tensor:
    """Cosines and sines for an interleaved sequence.

    Args:
        angles: fp32 [s, 1, 1, 2r], from megatron-core's RotaryEmbedding (both halves are equal).
        slots_per_token: slots per token; all slots of a token share its angles.
        dtype: of the torch table.

    Returns:
        [2, s * slots_per_token, 1, 1, r]: cosines, then sines; with Triton fp32 [2, s, 1, 1, r].
    """
    half = angles[..., : angles.size(-1) // 2]
    table = torch.stack((half.cos(), half.sin()))
    if uses_triton():
        return table
    table = table.to(dtype)
    return table.repeat_interleave(slots_per_token, dim=1)


def split_and_rotate(mixed: Tensor, table: Tensor, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused QKV projection into queries, keys and values; rotate queries and keys.

    Args:
        mixed: [slots, b, groups, (n + 2) * d]; each group has n queries, one key and one value.
            Triton overwrites it.
        table: from `rotary_table`, 2r <= d; or [2, slots, b, 1, r], one set of rows per sequence,
            if the sequences are at different positions.
        head_dim: d.

    Returns:
        Queries [slots, b, groups * n, d], keys and values [slots, b, groups, d]. The torch version
        lays each out in memory as [b, heads, slots, d], the fastest layout for attention on CPU.
        The Triton version returns views of `mixed` where possible.
    """
    if uses_triton():
        from megatron_ponder.kernels.triton import rotary

        return rotary.split_and_rotate(mixed, table, head_dim)
    by_head = mixed.unflatten(-1, (-1, head_dim))
    query, key, value = _SplitAndRotate.apply(by_head, table)  # type: ignore[no-untyped-call]
    return query, key, value


class _SplitAndRotate(torch.autograd.Function):
    """The module's formula. The backward writes all gradients into one tensor."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(table)
        ctx.shape = mixed.shape
        slots, b, groups, num_heads, d = mixed.shape
        query = mixed.new_empty(b, groups, num_heads - 2, slots, d)
        key = mixed.new_empty(b, groups, 1, slots, d)
        value = mixed.new_empty(b, groups, slots, d)
        # [b, groups, n, slots, d] -> [slots, b, groups, n, d], views
        _rotate(mixed[:, :, :, :-2], table[0], table[1], out=query.permute(3, 0, 1, 2, 4))
        _rotate(mixed[:, :, :, -2:-1], table[0], table[1], out=key.permute(3, 0, 1, 2, 4))
        value.copy_(mixed[:, :, :, -1].permute(1, 2, 0, 3))
        # [b, groups, n, slots, d] -> [slots, b, groups * n, d]
        heads_first = query.flatten(1, 2), key.flatten(1, 2), value
        query, key, value = (part.permute(2, 0, 1, 3) for part in heads_first)
        return query, key, value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        cos, minus_sin = table[0], -table[1]
        slots, b, groups, num_heads, d = ctx.shape
        grad_query, grad_key, grad_value = grad_outputs
        grad = grad_value.new_empty(ctx.shape)
        grad_query = grad_query.unflatten(2, (groups, num_heads - 2))
        _rotate(grad_query, cos, minus_sin, out=grad[:, :, :, :-2])
        _rotate(grad_key.unsqueeze(3), cos, minus_sin, out=grad[:, :, :, -2:-1])
        grad[:, :, :, -1] = grad_value
        return grad, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Rotate x [slots, b, groups, heads, d] into `out`, two operations per half."""
    r = cos.size(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # [slots, 1, 1, r] -> [slots, 1, 1, 1, r]
    x1, x2 = x[..., :r], x[..., r : 2 * r]
    y1, y2 = out[..., :r], out[..., r : 2 * r]
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
    if 2 * r < x.size(-1):
        out[..., 2 * r :] = x[..., 2 * r :]
