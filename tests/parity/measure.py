"""What is compared between layouts: logits, loss, gradient norm, gradients, weights after steps.

Runs inside ranks. Everything is returned whole (tensor-parallel shards and the distributed
optimizer's pieces put together), under the parameter's name, so that any layout can be laid beside
the single process.
"""

import dataclasses

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from megatron_ponder.config.schema import RunConfig
from megatron_ponder.model.build import build_model
from megatron_ponder.model.ponder_gpt_model import PonderGPTModel
from megatron_ponder.optim.adamw import build_optimizer
from megatron_ponder.parallel.gradients import wrap_data_parallel
from megatron_ponder.parallel.schedule import run_microbatches
from megatron_ponder.runtime import distributed
from megatron_ponder.runtime.device import device


@dataclasses.dataclass
class Measured:
    """One layout's numbers."""

    logits: Tensor
    """[b, s, v] of the whole batch in evaluation mode, padding stripped."""
    losses: list[float]
    """Of each step, before its update."""
    grad_norms: list[float]
    """Of each step, before clipping."""
    gradients: dict[str, Tensor]
    """Of the first step, before clipping."""
    weights: dict[str, Tensor]
    """After the last step."""


def measure(
    config: RunConfig,
    checkpoint: str,
    tokens: Tensor,
    num_steps: int,
    fault: str | None = None,
) -> Measured:
    """Load weights, run `num_steps` AdamW steps on one batch, collect everything.

    Args:
        config: resolved for this number of ranks.
        checkpoint: folder of weights written by `save_weights`.
        tokens: int64 [global batch, s + 1].
        num_steps: optimizer steps.
        fault: name of a planted fault (tests.parity.faults), for tests of the tests.
    """
    from tests.parity.faults import FAULTS

    distributed.initialize(config.parallel, config.training.seed)
    model = build_model(config)
    load_weights(model, checkpoint)
    if fault is not None:
        FAULTS[fault](model)
    plan = model.method.plan(config.method.num_jacobi_iterations)
    logits = gather_logits(model, tokens[:, :-1], plan)
    wrapped = wrap_data_parallel(model, config)
    optimizer, scheduler = build_optimizer(config, wrapped)
    result = Measured(logits=logits, losses=[], grad_norms=[], gradients={}, weights={})
    for step in range(num_steps):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        result.losses.append(run_step(wrapped, config, tokens, plan))
        if step == 0:
            result.gradients = gather_gradients(wrapped)
        success, grad_norm, _ = optimizer.step()
        assert success
        result.grad_norms.append(float(grad_norm))
        scheduler.step(increment=1)
    result.weights = {
        name: gather_shards(parameter, parameter.detach(), model)
        for name, parameter in model.named_parameters()
    }
    distributed.leave_layout()
    return result


def save_weights(config: RunConfig, state: dict[str, Tensor] | None, folder: str) -> None:
    """Write a one-rank checkpoint of weights: `state` (whole tensors), or the initial ones."""
    distributed.initialize(config.parallel, config.training.seed)
    model = build_model(config)
    if state is not None:
        model.load_state_dict(state, strict=False)
    dist_checkpointing.save(model.sharded_state_dict(), folder)
    distributed.leave_layout()


def load_weights(model: PonderGPTModel, folder: str) -> None:
    """Load such a checkpoint into any layout."""
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), folder))


def run_step(
    wrapped: DistributedDataParallel, config: RunConfig, tokens: Tensor, plan: object
) -> float:
    """Forward and backward of the whole batch spread over ranks; the mean loss over tokens."""
    ranks = distributed.ranks()
    mine = tokens.chunk(ranks.data_parallel_size)[ranks.data_parallel_rank]
    micro_batches = mine.split(config.training.micro_batch_size)
    batches = (
        {
            "tokens": part[:, :-1].contiguous(),
            "labels": part[:, 1:].contiguous(),
            "loss_mask": torch.ones(part.size(0), part.size(1) - 1),
        }
        for part in micro_batches
    )
    totals = run_microbatches(
        wrapped,
        batches,
        plan=plan,
        num_microbatches=len(micro_batches),
        micro_batch_size=config.training.micro_batch_size,
        seq_length=tokens.size(1) - 1,
    )
    dist.all_reduce(totals, group=distributed.data_parallel_group())
    return float(totals[0] / totals[1])


@torch.no_grad()
def gather_logits(model: PonderGPTModel, tokens: Tensor, plan: object) -> Tensor:
    """Logits of the whole vocabulary in evaluation mode."""
    model.eval()
    local = model(tokens.to(device()), None, plan).contiguous()
    model.train()
    parts = [torch.empty_like(local) for _ in range(distributed.ranks().tensor_parallel_size)]
    dist.all_gather(parts, local, group=distributed.tensor_parallel_group())
    return torch.cat(parts, dim=-1)[..., : model.shape.vocab_size].cpu()


def gather_gradients(wrapped: DistributedDataParallel) -> dict[str, Tensor]:
    """Whole gradients by name; under the distributed optimizer first completes each buffer."""
    if wrapped.ddp_config.use_distributed_optimizer:
        group = distributed.data_parallel_group()
        for buffer in wrapped.buffers:
            for bucket in buffer.buckets:
                mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                dist.all_gather(list(bucket.grad_data.chunk(group.size())), mine, group=group)
    return {
        name: gather_shards(parameter, parameter.main_grad, wrapped.module)
        for name, parameter in wrapped.module.named_parameters()
    }


def gather_shards(parameter: Tensor, tensor: Tensor, model: PonderGPTModel) -> Tensor:
    """`tensor`, sharded as `parameter` is, put together over the tensor-parallel ranks."""
    group = distributed.tensor_parallel_group()
    if not getattr(parameter, "tensor_model_parallel", False) or group.size() == 1:
        return tensor.clone().cpu()
    shards = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(shards, tensor.contiguous(), group=group)
    dim, stride = parameter.partition_dim, parameter.partition_stride
    pieces = [shard.chunk(stride, dim=dim) for shard in shards]
    return torch.cat(
        [pieces[r][k] for k in range(stride) for r in range(len(shards))], dim=dim
    ).cpu()
