"""The norm of the gradient, clipping, and the update: decided on the device, not by the host.

megatron-core computes the norm into a Python number, clips in a pass of its own over all gradients,
and steps. Between them the host waits for the whole step to be computed, and the device then for
the host. Here the norm stays a tensor, and torch's fused AdamW is given what to divide gradients by
(`grad_scale`) and whether to leave everything as it is (`found_inf`): inputs that were made for
loss scaling. Its kernel reads them on the device, so that clipping costs no pass over the gradients
and a skipped update no decision of the host.

Left out: gradients by part of the model that are clipped by themselves, as megatron-core 0.19 can.
"""

import math

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor

from megatron_ponder.runtime.device import device

NORM_MARGIN = 1e-6
"""megatron-core adds it to the norm before it divides by it."""
GRADIENTS_FOR_NORM = (
    "get_grads_for_grad_norm"  # megatron-core 0.19
    if hasattr(MegatronOptimizer, "get_grads_for_grad_norm")
    else "get_main_grads_for_grad_norm"  # 0.16
)
"""The method that lists this rank's share of the gradient, every entry on one rank only."""


@torch.no_grad()
def gradient_norm(optimizer: ChainedOptimizer) -> Tensor:
    """Euclidean norm of the whole model's gradient, the same on all ranks.

    megatron-core's `get_grad_norm`, of the same gradients and over the same ranks, without its
    wait. `prepare_grads` must have been called.

    Returns:
        fp64 [].
    """
    squares = [_squared_norm(part) for part in optimizer.chained_optimizers]
    return torch.stack(squares).sum().sqrt()


def _squared_norm(part: MegatronOptimizer) -> Tensor:
    """Of the gradients of one of the chained optimizers: fp64 []."""
    gradients = getattr(part, GRADIENTS_FOR_NORM)()
    # Without gradients torch answers with a tensor on the CPU.
    norm = torch.nn.utils.get_total_norm(gradients).to(device()) if gradients else _zero()
    square = norm.square()
    dist.all_reduce(square, group=part.get_grad_stats_parallel_group())
    return square.double()


def _zero() -> Tensor:
    """fp32 [], 0."""
    return torch.zeros((), device=device())


@torch.no_grad()
def clipped_update(optimizer: ChainedOptimizer, grad_norm: Tensor, is_finite: Tensor) -> None:
    """Clip the gradient to the norm that the run allows, and step; or leave everything as it is.

    Gradients are divided by max(1, (norm + 1e-6) / clip_grad).

    Args:
        optimizer: its gradients are prepared.
        grad_norm: fp64 [], the norm before clipping.
        is_finite: bool []; where false, weights, moments and the count of steps stay.
    """
    parts = [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]
    inner = [part.optimizer for part in parts]
    if not all(isinstance(each, torch.optim.Adam) for each in inner):  # AdamW is a subclass
        _update_by_host(optimizer, parts, grad_norm, is_finite)
        return
    clip_grad = optimizer.config.clip_grad
    scale = ((grad_norm + NORM_MARGIN) / clip_grad).clamp(min=1.0).float()
    for each in inner:
        # Where clipping is off, nothing is divided: the kernel would write every gradient back.
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
    """The same for the Adam of TransformerEngine or apex, which takes no such inputs.

    The host reads the norm, and megatron-core clips in a pass of its own. Not run with either
    library, as our tests have neither; torch's SGD takes their place.
    """
    if not is_finite.item():
        return
    for part in parts:
        clip_grad_by_total_norm_fp32(
            part.get_parameters(), max_norm=part.config.clip_grad, total_norm=grad_norm.item()
        )
    optimizer.step_with_ready_grads()
