"""SwiGLU, y = silu(a) * b for x = (a, b) along the last dim, with a custom backward.

With s = sigmoid(a) and silu(a) = a s:

    da = dy * b * s * (1 + a (1 - s))
    db = dy * silu(a)

Composed by autograd, SwiGLU saves silu(a) in addition to x, and writes da and db twice, the second
time to concatenate them. This version saves only x, recomputes silu(a), and writes both gradients
directly into dx.

With Triton each direction is one kernel, with fp32 arithmetic and one rounding. Memory traffic per
element of y, of e bytes:

    forward     3 e: reads a and b, writes y          (composed: 5 e in 2 launches)
    backward    5 e: reads dy, a, b, writes da, db    (composed: 11 e in 4 launches)

The input is not modified, so selective recomputation needs no special case for this function.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.kernels.dispatch import uses_triton


def swiglu(x: Tensor) -> Tensor:
    """Gate the second half by silu of the first: [..., 2f] -> [..., f]."""
    if uses_triton():
        from megatron_ponder.kernels.triton import swiglu as kernel

        return kernel.swiglu(x)
    out: Tensor = _Swiglu.apply(x)  # type: ignore[no-untyped-call]
    return out


class _Swiglu(torch.autograd.Function):
    """See the module's formulas."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        a, b = x.chunk(2, dim=-1)
        return F.silu(a).mul_(b)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        (dy,) = grad_outputs
        a, b = x.chunk(2, dim=-1)
        dx = torch.empty_like(x)
        da, db = dx.chunk(2, dim=-1)
        torch.mul(dy, b, out=da)
        torch.ops.aten.silu_backward(da, a, grad_input=da)
        torch.mul(F.silu(a), dy, out=db)
        return dx
