"""Forward and backward of one step over all micro-batches, on megatron-core's schedules.

The caller passes micro-batches and a plan, and receives the loss. The gradients are left in the
model's gradient buffers, summed over data-parallel ranks and divided by the number of tokens in the
global batch.

With one pipeline stage, a micro-batch runs all passes at once. With several stages, every pass is a
chunk of the interleaved schedule (`ponder.chunks`). Each step builds one module per chunk for the
schedule; all of them share the same weights. The number of passes may therefore change from step to
step.
"""

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.schedules import (
    forward_backward_no_pipelining,
    forward_backward_pipelining_with_interleaving,
    forward_backward_pipelining_without_interleaving,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ponder.model.context_parallel import local_shard
from megatron_ponder.parallel.communicator import PassCommunicator
from megatron_ponder.parallel.parallel_model import ParallelModel
from megatron_ponder.ponder.chunks import cut_into_chunks
from megatron_ponder.ponder.plan import Pass, PassPlan
from megatron_ponder.runtime.device import device
from megatron_ponder.runtime.distributed import context_parallel_group, process_groups, ranks

Batch = dict[str, Tensor]
"""`tokens` and `labels`, int64 [b, s]; `loss_mask`, fp32 [b, s]."""


def run_microbatches(
    model: ParallelModel,
    batches: Iterator[Batch],
    *,
    plan: PassPlan,
    num_microbatches: int,
    micro_batch_size: int,
    seq_length: int,
    forward_only: bool = False,
    overlap_p2p_communication: bool = False,
) -> Tensor:
    """Run the forward and, unless `forward_only`, the backward of `num_microbatches` micro-batches.

    Args:
        model: this rank's part; its gradient buffers must be zero.
        batches: this rank's micro-batches, the same on all ranks of a tensor-parallel, pipeline or
            context-parallel group.
        plan: the same for all micro-batches and all ranks.
        num_microbatches: micro-batches on each data-parallel rank; with several pipeline stages a
            multiple of their number.
        micro_batch_size: sequences in each micro-batch.
        seq_length: tokens in each sequence.
        forward_only: skip the backward, for evaluation.
        overlap_p2p_communication: whether stages overlap computation and communication.

    Returns:
        fp64 [2] on this rank's device: the sum of the loss over this rank's unmasked tokens, and
        their number. Both are zero except on the last pipeline stage. They are not reduced over
        ranks, and the call does no device synchronisation.
    """
    config = _schedule_config(model)
    prepared = map(_prepare, batches)
    common: dict[str, Any] = {
        "forward_step_func": _forward_step,
        "num_microbatches": num_microbatches,
        "seq_length": seq_length,
        "micro_batch_size": micro_batch_size,
        "forward_only": forward_only,
        "pg_collection": process_groups(),
    }
    if ranks().pipeline_parallel_size > 1:
        return _run_pipeline(config, model, plan, prepared, overlap_p2p_communication, common)
    (chunk,) = model.chunks
    scheduled = _Scheduled(config, chunk, plan, None)
    return _total(forward_backward_no_pipelining(model=scheduled, data_iterator=prepared, **common))


def _run_pipeline(
    config: TransformerConfig,
    model: ParallelModel,
    plan: PassPlan,
    prepared: Iterator[Batch],
    overlaps: bool,
    common: dict[str, Any],
) -> Tensor:
    """Run several pipeline stages: every pass is a chunk and uses the same micro-batches.

    A single chunk (vanilla) runs megatron-core's non-interleaved schedule, which starts its
    backward sooner and has nothing to overlap.
    """
    chunks = cut_into_chunks(plan, len(model.chunks))
    scheduled = [_Scheduled(config, model.chunks[c.layer_chunk], plan, c.pass_) for c in chunks]
    micro_batches = [next(prepared) for _ in range(common["num_microbatches"])]
    here, interleaves = ranks(), len(chunks) > 1
    config.virtual_pipeline_model_parallel_size = len(chunks) if interleaves else None
    config.microbatch_group_size_per_vp_stage = here.pipeline_parallel_size
    config.overlap_p2p_comm = overlaps and interleaves
    config.batch_p2p_comm = not config.overlap_p2p_comm
    num_shards = here.context_parallel_size
    if config.sequence_parallel:
        num_shards *= here.tensor_parallel_size
    communicator = PassCommunicator(
        config,
        chunks,
        num_microbatches=common["num_microbatches"],
        num_tokens_local=common["seq_length"] // num_shards,
        micro_batch_size=common["micro_batch_size"],
        forward_only=common["forward_only"],
    )
    if interleaves:
        losses = forward_backward_pipelining_with_interleaving(
            model=scheduled,
            data_iterator=[iter(micro_batches) for _ in chunks],
            p2p_communicator=communicator,
            **common,
        )
    else:
        losses = forward_backward_pipelining_without_interleaving(
            model=scheduled[0],
            data_iterator=iter(micro_batches),
            p2p_communicator=communicator,
            **common,
        )
    communicator.finish()
    return _total(losses)


def all_reduce_totals(totals: Tensor) -> Tensor:
    """All-reduce the totals of `run_microbatches` over all ranks, in place.

    All ranks of a tensor-parallel group hold the same loss, so only the first of them contributes.
    In a pipeline, only the last stage has a loss.

    Args:
        totals: fp64; entries after the first two are summed over all ranks.
    """
    if ranks().tensor_parallel_rank != 0:
        totals[:2] = 0
    dist.all_reduce(totals)
    return totals


class _Scheduled(torch.nn.Module):
    """The module that a megatron-core schedule runs as its model: one pass, or a whole forward.

    Args:
        config: the config of the schedule.
        chunk: the layer chunk with the weights.
        plan: the passes.
        pass_: the pass to run; None: all passes.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(
        self,
        config: TransformerConfig,
        chunk: DistributedDataParallel,
        plan: PassPlan,
        pass_: Pass | None,
    ) -> None:
        super().__init__()
        self.config = config
        self._model = chunk.module
        self._plan = plan
        self._pass = pass_
        self._received: Tensor | None = None

    def set_input_tensor(self, input_tensors: list[Tensor | None]) -> None:
        """Store the tensor that the schedule received for the next forward."""
        (self._received,) = input_tensors

    def forward(self, batch: Batch) -> Tensor:
        """Return token losses, or the output for the next stage."""
        tokens, labels = batch["tokens"], batch["labels"]
        if self._pass is None:
            output: Tensor = self._model(tokens, labels, self._plan)
        else:
            output = self._model.forward_pass(
                self._pass, self._plan, tokens, labels, self._received
            )
        return output


def _schedule_config(model: ParallelModel) -> TransformerConfig:
    """A copy of the model's config for the schedule.

    The schedule needs one virtual stage per chunk. The model's own config must not have these,
    because megatron-core derives the layer numbers from it.
    """
    config = copy.copy(model.modules[0].config)
    config.no_sync_func = model.no_sync

    def finalize(scheduled: list[torch.nn.Module], num_tokens: Tensor, **kwargs: Any) -> None:
        finalize_model_grads(model.chunks, **kwargs)
        _divide_gradients(model, num_tokens)
        for module in model.modules:
            module.all_reduce_replicated_embedding()

    config.finalize_model_grads_func = finalize
    return config


def _divide_gradients(model: ParallelModel, num_tokens: Tensor) -> None:
    """Divide the gradients by the number of tokens in the global batch.

    `finalize_model_grads` can do this too, but checks on the host whether the number is above zero
    (megatron-core 0.16.1), which is a device synchronisation.

    Args:
        model: its gradients are already reduced over ranks.
        num_tokens: int32 [], tokens in this rank's micro-batches; only the last pipeline stage's
            value is used.
    """
    groups = process_groups()
    last_stage = dist.get_process_group_ranks(groups.pp)[-1]
    dist.broadcast(num_tokens, src=last_stage, group=groups.pp)
    dist.all_reduce(num_tokens, group=groups.dp_cp)
    for chunk in model.chunks:
        chunk.scale_gradients(1.0 / num_tokens.clamp(min=1))


def _prepare(batch: Batch) -> Batch:
    """Move a micro-batch to this rank's device, and keep this rank's shard of its sequences."""
    return {
        name: local_shard(
            tensor.to(device(), non_blocking=True), dim=1, group=context_parallel_group()
        )
        for name, tensor in batch.items()
    }


def _forward_step(batches: Iterator[Batch], model: _Scheduled) -> tuple[Tensor, Callable[..., Any]]:
    """Run one micro-batch; return its output, and the function that reduces it to a loss."""
    batch = next(batches)
    return model(batch), functools.partial(_sum_loss, batch["loss_mask"])


def _sum_loss(loss_mask: Tensor, token_losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The masked loss sum to differentiate, the number of tokens, and both as fp64 [2]."""
    total = (token_losses * loss_mask).sum()
    num_tokens = loss_mask.sum()
    report = torch.stack((total.detach(), num_tokens)).double()
    return total, num_tokens.to(torch.int), report


def _total(losses: list[Tensor]) -> Tensor:
    """Sum of the fp64 [2] of all micro-batches; zero on stages that compute no loss."""
    if not losses:
        return torch.zeros(2, dtype=torch.float64, device=device())
    return torch.stack(losses).sum(dim=0)
