"""One step's forward and backward over all micro-batches, on megatron-core's schedules.

The caller gives micro-batches and a plan, and gets back the loss; gradients are left, summed over
data-parallel ranks and divided by the number of tokens of the whole global batch, in the model's
gradient buffers.
"""

import functools
from collections.abc import Iterator

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from megatron_ponder.ponder.plan import PassPlan
from megatron_ponder.runtime.device import device

Batch = dict[str, Tensor]
"""`tokens` and `labels`, int64 [b, s]; `loss_mask`, fp32 [b, s]."""


def run_microbatches(
    model: DistributedDataParallel,
    batches: Iterator[Batch],
    *,
    plan: PassPlan,
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
    forward_only: bool = False,
) -> Tensor:
    """Forward, and unless `forward_only` backward, of `num_microbatches` micro-batches.

    Args:
        model: the wrapped model; its gradient buffers must be zero.
        batches: this rank's micro-batches.
        plan: the same for all micro-batches and all ranks.
        num_microbatches: micro-batches on each rank.
        micro_batch_size: sequences in each.
        seq_length: tokens in each sequence.
        forward_only: evaluation.

    Returns:
        fp64 [2] on this rank's device: the sum of the loss over this rank's unmasked tokens, and
        their number. Nothing has been reduced over ranks, and nothing has waited for the device.
    """
    losses = get_forward_backward_func()(
        forward_step_func=functools.partial(_forward_step, plan=plan),
        data_iterator=batches,
        model=model,
        num_microbatches=num_microbatches,
        seq_length=seq_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    return torch.stack(losses).sum(dim=0)


def _forward_step(
    batches: Iterator[Batch], model: DistributedDataParallel, *, plan: PassPlan
) -> tuple[Tensor, functools.partial]:
    """One micro-batch: the token losses, and how to reduce them (megatron-core's protocol)."""
    batch = {name: tensor.to(device(), non_blocking=True) for name, tensor in next(batches).items()}
    token_losses = model(batch["tokens"], batch["labels"], plan)
    return token_losses, functools.partial(_sum_loss, batch["loss_mask"])


def _sum_loss(loss_mask: Tensor, token_losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The masked sum that is differentiated, the number of tokens, and both for the report."""
    total = (token_losses * loss_mask).sum()
    num_tokens = loss_mask.sum()
    report = torch.stack((total.detach(), num_tokens)).double()
    return total, num_tokens.to(torch.int), report
