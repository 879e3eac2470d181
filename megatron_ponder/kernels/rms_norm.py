"""RMSNorm, y = x / sqrt(mean(x^2) + eps) * w over the last dim, with a backward of its own on CPU.

With r = 1 / sqrt(mean(x^2) + eps), g = dy * w and h entries:

    dx = r * (g - x * r^2 * sum(g * x) / h)
    dw = sum over all rows of dy * x * r

torch composes it on CPU from squares, means and products, each a pass over memory, and keeps three
tensors for the backward; here only x and r are kept. On CUDA torch has a fused kernel, which is
used there; it is also used where the precision is below fp32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Norm the last dim.

    Args:
        x: [..., h].
        weight: [h], in x's dtype.
        eps: added to the mean of squares.

    Returns:
        [..., h].
    """
    if x.is_cuda or x.dtype not in (torch.float32, torch.float64):
        return F.rms_norm(x, weight.shape, weight, eps)
    normed: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return normed


class _RmsNorm(torch.autograd.Function):
    """See the module's formulas."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        h = x.size(-1)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        r = norm.square_().div_(h).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, r)
        normed: Tensor = (x * r).mul_(weight)
        return normed

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        (dy,) = grad_outputs
        h = x.size(-1)
        normed = x * r
        products = (dy * normed).reshape(-1, h)
        dw = products.sum(dim=0)
        mean = (products @ weight).div_(h).view(r.shape)  # of g * x, times r
        dx = (dy * weight).addcmul_(normed, mean, value=-1).mul_(r)
        return dx, dw, None
