"""RMSNorm or LayerNorm of some stages of an interleaved sequence.

For a token t, stages first..first+m-1 of n, and x = hidden[t * n + first + i]:

    RMSNorm     y[t * m + i] = x r w              r = 1 / sqrt(mean(x^2) + eps)
    LayerNorm   y[t * m + i] = (x - a) r w + c    a = mean(x), r = 1 / sqrt(mean((x - a)^2) + eps)

    backward, with u = (x - a) r (a = 0 for RMSNorm) and g = dy w:
        dx = r (g - [mean(g), LayerNorm only] - u mean(g u))       0 at stages that are not read
        dw = sum of dy u;   dc = sum of dy                          over all rows read

In fp32; y, dx and the parameters' gradients are rounded once. Composed, the slots are copied out,
normed, and in the backward copied into a tensor of zeros: per element read of e bytes and n / m
elements in the whole, 4 e forward and (3 + 1 + n / m + 2) e backward, against 2 e and (2 + n / m) e
here. Where every stage is read there is nothing to fuse, and torch's own norms are used; so it is
with the final norm, because the last layer gives nothing but what is read. What this serves is the
second norm of a last layer with a parallel residual, which reads the layer's whole input.
"""

import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.kernels.dispatch import uses_triton
from megatron_ponder.kernels.interleave import select_slots
from megatron_ponder.kernels.rms_norm import rms_norm


def norm_slots(
    hidden: Tensor,
    slots_per_token: int,
    stages: range,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    is_layer_norm: bool,
) -> Tensor:
    """Norm consecutive stages.

    Args:
        hidden: [s * n, b, h].
        slots_per_token: n.
        stages: those to norm, m of them.
        weight: [h].
        bias: [h]; None for RMSNorm.
        eps: added to the mean of squares.
        is_layer_norm: LayerNorm, else RMSNorm.

    Returns:
        [s * m, b, h].
    """
    if uses_triton() and len(stages) < slots_per_token:
        from megatron_ponder.kernels.triton import norm

        return norm.norm_slots(hidden, slots_per_token, stages, weight, bias, eps)
    kept = select_slots(hidden, slots_per_token, stages)
    if is_layer_norm:
        return F.layer_norm(kept, weight.shape, weight, bias, eps)
    return rms_norm(kept, weight, eps)
