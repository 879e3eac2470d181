"""Gradient norm, clipping and update without a device synchronisation.

megatron-core returns the norm as a Python number, clips in a separate sweep over all gradients, and
then steps. Fetching the norm is a device synchronisation, and the device then idles until the host
has launched the update. Here the norm stays a tensor. torch's fused AdamW receives the divisor of
the gradients (`grad_scale`) and the flag that skips the update (`found_inf`), two inputs meant for
loss scaling. Its kernel loads both from device memory. Clipping therefore needs no extra sweep over
the gradients, and skipping an update needs no decision on the host.

Separate clipping for parts of the model, as in megatron-core 0.19, is not supported.
"""

import math

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from megatron_ponder.runtime.device import device

NORM_MARGIN = 1e-6
"""megatron-core adds this to the norm before it divides the gradients by the norm."""
GRADIENTS_FOR_NORM = (
    "get_grads_for_grad_norm"  # megatron-core 0.19
    if hasattr(MegatronOptimizer, "get_grads_for_grad_norm")
    else "get_main_grads_for_grad_norm"  # 0.16
)
"""The method that lists this rank's share of the gradient; no entry is on two ranks."""


@torch.no_grad()
def gradient_norm(optimizer: ChainedOptimizer) -> Tensor:
    """Euclidean norm of the whole model's gradient, the same on all ranks.

    Equal to megatron-core's `get_grad_norm`, over the same gradients and ranks, but without a
    device synchronisation. Call `prepare_grads` first.

    Returns:
        fp64 [].
    """
    squares = [_squared_norm(part) for part in optimizer.chained_optimizers]
    return torch.stack(squares).sum().sqrt()


def _squared_norm(part: MegatronOptimizer) -> Tensor:
    """Squared norm of the gradients of one of the chained optimizers: fp64 []."""
    gradients = getattr(part, GRADIENTS_FOR_NORM)()
    # For an empty list, get_total_norm returns a CPU tensor.
    norm = torch.nn.utils.get_total_norm(gradients).to(device()) if gradients else _zero()
    square = norm.square()
    dist.all_reduce(square, group=part.get_grad_stats_parallel_group())
    return square.double()


def _zero() -> Tensor:
    """fp32 [], 0."""
    return torch.zeros((), device=device())


@torch.no_grad()
def clipped_update(optimizer: ChainedOptimizer, grad_norm: Tensor, is_finite: Tensor) -> None:
    """Clip the gradients and update the weights, or skip the update if `is_finite` is false.

    Gradients are divided by max(1, (norm + 1e-6) / clip_grad).

    Args:
        optimizer: its gradients are prepared.
        grad_norm: fp64 [], the norm before clipping.
        is_finite: bool []; if false, weights, moments and step count do not change.
    """
    parts = [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]
    inner = [part.optimizer for part in parts]
    if not all(isinstance(each, torch.optim.Adam) for each in inner):  # AdamW is a subclass
        _update_by_host(optimizer, parts, grad_norm, is_finite)
        return
    clip_grad = optimizer.config.clip_grad
    scale = ((grad_norm + NORM_MARGIN) / clip_grad).clamp(min=1.0).float()
    for each in inner:
        # None if clipping is off: with a scale, the kernel would also store every gradient.
        each.grad_scale = scale if math.isfinite(clip_grad) else None
        each.found_inf = (~is_finite).float()
    optimizer.step_with_ready_grads()
    for each in inner:
        del each.grad_scale, each.found_inf


def _update_by_host(
    optimizer: ChainedOptimizer,
    parts: list[MegatronOptimizer],
    grad_norm: Tensor,
    is_finite: Tensor,
) -> None:
    """Clip and update with the Adam of TransformerEngine or apex, which lacks these inputs.

    The host fetches the norm, and megatron-core clips in a separate sweep. Our tests have neither
    library and run this function with torch's SGD instead.
    """
    if not is_finite.item():
        return
    for part in parts:
        clip_grad_by_total_norm_fp32(
            part.get_parameters(), max_norm=part.config.clip_grad, total_norm=grad_norm.item()
        )
    optimizer.step_with_ready_grads()
