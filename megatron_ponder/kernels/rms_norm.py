"""RMSNorm, y = x / sqrt(mean(x^2) + eps) * w over the last dim, with a custom backward on CPU.

With r = 1 / sqrt(mean(x^2) + eps), g = dy * w and h entries:

    dx = r * (g - x * r^2 * sum(g * x) / h)
    dw = sum over all rows of dy * x * r

On CPU, torch composes RMSNorm from elementwise operations and means, each a sweep over memory, and
saves three tensors for the backward. This version saves only x and r. On CUDA, and for dtypes
below fp32, we use torch's own RMSNorm, which is a fused kernel on CUDA.
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
        dw_by_row = (dy * normed).reshape(-1, h)
        dw = dw_by_row.sum(dim=0)
        mean = (dw_by_row @ weight).div_(h).view(r.shape)  # r * sum(g * x) / h
        dx = (dy * weight).addcmul_(normed, mean, value=-1).mul_(r)
        return dx, dw, None
