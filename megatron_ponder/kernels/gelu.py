"""GELU of a projection and its bias, y = gelu(x + c), exact or by the tanh approximation.

With u = x + c:

    exact   y = u P              P = (1 + erf(u / sqrt 2)) / 2
            dy/du = P + u exp(-u^2 / 2) / sqrt(2 pi)
    tanh    y = u s              s = sigmoid(2 z),  z = sqrt(2 / pi) (u + 0.044715 u^3)
            dy/du = s + u s (1 - s) 2 dz/du,        dz/du = sqrt(2 / pi) (1 + 3 * 0.044715 u^2)

(1 + tanh z) / 2 is sigmoid(2 z). dx is dy times the derivative, and dc its sum over all rows. On
torch it is composed, and keeps u. With Triton each way is one launch and x is kept instead; u is
rounded only where y and dx are. Per element of e bytes:

    forward     2 e: reads x, writes y         (composed: 4 e in 2 launches)
    backward    3 e: reads dy, x, writes dx    (composed: 4 e in 2 launches, the second sums dc)
"""

import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.kernels.dispatch import uses_triton


def gelu(x: Tensor, bias: Tensor | None, *, is_tanh: bool) -> Tensor:
    """Add the bias and activate.

    Args:
        x: [..., f].
        bias: [f], or None.
        is_tanh: the approximation (GPT-2), else exact (GPT-NeoX).

    Returns:
        [..., f].
    """
    if uses_triton():
        from megatron_ponder.kernels.triton import gelu as kernel

        return kernel.gelu(x, bias, is_tanh=is_tanh)
    u = x if bias is None else x + bias
    return F.gelu(u, approximate="tanh" if is_tanh else "none")
