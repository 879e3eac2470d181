"""Rotary position embedding, all slots of a token at the token's position.

For a head's first 2r channels, x = (x1, x2) of r channels each, at angle a[t, i] = t * base^(-i/r):

    y1 = x1 cos a - x2 sin a
    y2 = x2 cos a + x1 sin a

and the other channels unchanged. The backward is the rotation by -a. Written as one function with
its own backward, from the joint projection to queries, keys and values, because composed from
slices and concatenations it copies each query and key about six times.

With Triton the rotation happens in the projection's output, and queries, keys and values are views
of it: of q + k + v elements the rotated ones of q + k are read and written once, forward, and all
are read and written once, backward. The table then has a row per token in fp32, which all its
slots read; in torch it has a row per slot, in the run's dtype.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_ponder.kernels.dispatch import uses_triton


def rotary_table(angles: Tensor, slots_per_token: int, dtype: torch.dtype) -> Tensor:
    """Cosines and sines for an interleaved sequence.

    Args:
        angles: fp32 [s, 1, 1, 2r], from megatron-core's RotaryEmbedding (both halves are equal).
        slots_per_token: slots per token, which share its angles.
        dtype: of the table in torch.

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
    """Queries, keys and values of a joint projection, the first two rotated.

    Args:
        mixed: [slots, b, groups, (n + 2) * d]; each group holds its n queries, its key, its value.
            With Triton it is overwritten.
        table: from `rotary_table`, 2r <= d; or [2, slots, b, 1, r] with rows of its own for each
            sequence, where sequences are at different positions.
        head_dim: d.

    Returns:
        Queries [slots, b, groups * n, d], keys and values [slots, b, groups, d]; in memory each is
        [b, heads, slots, d], which attention on CPU reads fastest; with Triton they stay in
        `mixed`.
    """
    if uses_triton():
        from megatron_ponder.kernels.triton import rotary

        return rotary.split_and_rotate(mixed, table, head_dim)
    by_head = mixed.unflatten(-1, (-1, head_dim))
    query, key, value = _SplitAndRotate.apply(by_head, table)  # type: ignore[no-untyped-call]
    return query, key, value


class _SplitAndRotate(torch.autograd.Function):
    """See the module's formula; the backward writes all gradients into one tensor."""

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
    """The rotation of x [slots, b, groups, heads, d] into `out`, each half in two passes."""
    r = cos.size(-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # [slots, 1, 1, r] -> [slots, 1, 1, 1, r]
    x1, x2 = x[..., :r], x[..., r : 2 * r]
    y1, y2 = out[..., :r], out[..., r : 2 * r]
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
    if 2 * r < x.size(-1):
        out[..., 2 * r :] = x[..., 2 * r :]
