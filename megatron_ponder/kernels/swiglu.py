"""SwiGLU, y = silu(a) * b for x = (a, b) along the last dim, with a backward of its own.

With s = sigmoid(a) and silu(a) = a s:

    da = dy * b * s * (1 + a (1 - s))
    db = dy * silu(a)

Composed by autograd it keeps silu(a) besides x, and writes da and db twice to lay them side by
side. Here only x is kept, silu(a) is computed again, and both gradients are written in place.

With Triton each way is one launch, in fp32 inside and rounded once. Per element of y, of e bytes:

    forward     3 e: reads a and b, writes y          (torch here: 5 e in 2 launches)
    backward    5 e: reads dy, a, b, writes da, db    (torch here: 11 e in 4 launches)

The input stays as it is: what keeps or recomputes activations need not know of this function.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.kernels.dispatch import uses_triton


def swiglu(x: Tensor) -> Tensor:
    """Gate one half with the other: [..., 2f] -> [..., f]."""
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
