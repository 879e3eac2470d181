"""GELU of a projection plus its bias, y = gelu(x + c), exact or with the tanh approximation.

With u = x + c:

    exact   y = u P              P = (1 + erf(u / sqrt 2)) / 2
            dy/du = P + u exp(-u^2 / 2) / sqrt(2 pi)
    tanh    y = u s              s = sigmoid(2 z),  z = sqrt(2 / pi) (u + 0.044715 u^3)
            dy/du = s + u s (1 - s) 2 dz/du,        dz/du = sqrt(2 / pi) (1 + 3 * 0.044715 u^2)

since (1 + tanh z) / 2 = sigmoid(2 z). dx is dy times dy/du, and dc is the sum of dx over all rows.
The torch version is composed of two operations and saves u. The Triton version is one kernel in
each direction and saves x. It does not round u; it rounds only y and dx. Memory traffic per
element of e bytes:

    forward     2 e: reads x, writes y         (composed: 4 e in 2 launches)
    backward    3 e: reads dy, x, writes dx    (composed: 4 e in 2 launches, the second sums dc)
"""

import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.kernels.dispatch import uses_triton


def gelu(x: Tensor, bias: Tensor | None, *, is_tanh: bool) -> Tensor:
    """Add the bias, then apply GELU.

    Args:
        x: [..., f].
        bias: [f], or None.
        is_tanh: use the tanh approximation (GPT-2); otherwise exact (GPT-NeoX).

    Returns:
        [..., f].
    """
    if uses_triton():
        from megatron_ponder.kernels.triton import gelu as kernel

        return kernel.gelu(x, bias, is_tanh=is_tanh)
    u = x if bias is None else x + bias
    return F.gelu(u, approximate="tanh" if is_tanh else "none")
