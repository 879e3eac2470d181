"""RMSNorm or LayerNorm of selected slots of an interleaved sequence.

For token t, slots first..first+m-1 of n, and x = hidden[t * n + first + i]:

    RMSNorm     y[t * m + i] = x r w              r = 1 / sqrt(mean(x^2) + eps)
    LayerNorm   y[t * m + i] = (x - a) r w + c    a = mean(x), r = 1 / sqrt(mean((x - a)^2) + eps)

    backward, with u = (x - a) r (a = 0 for RMSNorm) and g = dy w:
        dx = r (g - [mean(g), LayerNorm only] - u mean(g u))       0 at the other slots
        dw = sum of dy u;   dc = sum of dy                          over the selected rows

The arithmetic is fp32; y, dx and the parameters' gradients are rounded once. The composed form
copies the selected slots, norms the copy, and in the backward copies the gradient into a tensor of
zeros. Per selected element of e bytes it moves 4 e forward and (3 + 1 + n / m + 2) e backward; the
kernel moves 2 e and (2 + n / m) e. If m = n there is nothing to fuse, and torch's own norms run.
The only caller is the second norm of a last layer with parallel residual: its input has all slots,
but its MLP needs the output slots only.
"""

import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.kernels.dispatch import uses_triton
from megatron_ponder.kernels.interleave import select_slots
from megatron_ponder.kernels.rms_norm import rms_norm


def norm_slots(
    hidden: Tensor,
    slots_per_token: int,
    slots: range,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    is_layer_norm: bool,
) -> Tensor:
    """Norm m consecutive slots of every token.

    Args:
        hidden: [s * n, b, h].
        slots_per_token: n.
        slots: the m slots to norm.
        weight: [h].
        bias: [h]; None for RMSNorm.
        eps: added to the mean of squares.
        is_layer_norm: LayerNorm; otherwise RMSNorm.

    Returns:
        [s * m, b, h].
    """
    if uses_triton() and len(slots) < slots_per_token:
        from megatron_ponder.kernels.triton import norm

        return norm.norm_slots(hidden, slots_per_token, slots, weight, bias, eps)
    kept = select_slots(hidden, slots_per_token, slots)
    if is_layer_norm:
        return F.layer_norm(kept, weight.shape, weight, bias, eps)
    return rms_norm(kept, weight, eps)
