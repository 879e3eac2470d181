"""Rotary position embedding, all slots of a token at the token's position.

For a head's first 2r channels, x = (x1, x2) of r channels each, at angle a[t, i] = t * base^(-i/r):

    y1 = x1 cos a - x2 sin a
    y2 = x2 cos a + x1 sin a

and the other channels unchanged. The backward is the rotation by -a. Written as one function with
its own backward because composed from slices and concatenations it copies each query and key about
six times.
"""

from typing import Any

import torch
from torch import Tensor


def rotary_table(angles: Tensor, num_stages: int, dtype: torch.dtype) -> Tensor:
    """Cosines and sines for an interleaved sequence.

    Args:
        angles: fp32 [s, 1, 1, 2r], from megatron-core's RotaryEmbedding (both halves are equal).
        num_stages: slots per token, which share its angles.
        dtype: of the table.

    Returns:
        [2, s * num_stages, 1, 1, r]: cosines, then sines.
    """
    half = angles[..., : angles.size(-1) // 2]
    table = torch.stack((half.cos(), half.sin())).to(dtype)
    return table.repeat_interleave(num_stages, dim=1)


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate queries or keys.

    Args:
        x: [slots, b, heads, d].
        table: [2, slots, 1, 1, r] from `rotary_table`, 2r <= d, in x's dtype.

    Returns:
        [slots, b, heads, d], contiguous.
    """
    return _Rotary.apply(x, table)


class _Rotary(torch.autograd.Function):
    """See the module's formula."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(table)
        return _rotate(x, table[0], table[1])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (table,) = ctx.saved_tensors
        return _rotate(grad_outputs[0], table[0], -table[1]), None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation, each half in two passes over memory."""
    r = cos.size(-1)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    x1, x2 = x[..., :r], x[..., r : 2 * r]
    y1, y2 = y[..., :r], y[..., r : 2 * r]
    torch.mul(x1, cos, out=y1).addcmul_(x2, sin, value=-1)
    torch.mul(x2, cos, out=y2).addcmul_(x1, sin)
    y[..., 2 * r :] = x[..., 2 * r :]
    return y
