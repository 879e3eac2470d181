"""What is compared between layouts: logits, loss, gradient norm, gradients, weights after steps.

Runs inside ranks. Everything is returned whole (tensor-parallel shards, context-parallel shards,
pipeline stages and the distributed optimizer's pieces put together), under the parameter's name, so
that any layout can be laid beside the single process.
"""

import dataclasses

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.optimizer import ChainedOptimizer
from torch import Tensor

from megatron_ponder.checkpoint.state import complete_parameters
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.model.build import build_model, build_model_chunks
from megatron_ponder.model.context_parallel import gather_sequence
from megatron_ponder.model.ponder_gpt_model import PonderGPTModel
from megatron_ponder.optim.adamw import build_optimizer
from megatron_ponder.optim.update import clipped_update, gradient_norm
from megatron_ponder.parallel.parallel_model import ParallelModel, wrap_data_parallel
from megatron_ponder.parallel.schedule import all_reduce_totals, run_microbatches
from megatron_ponder.ponder.plan import PassPlan
from megatron_ponder.ponder.training_plan import training_plan
from megatron_ponder.runtime import distributed


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
    *,
    jacobi_iterations: tuple[int, ...] = (),
    loss_mask: Tensor | None = None,
) -> Measured:
    """Load weights, run `num_steps` AdamW steps on one batch, collect everything.

    Args:
        config: resolved for this number of ranks.
        checkpoint: folder of weights written by `save_weights`.
        tokens: int64 [global batch, s + 1].
        num_steps: optimizer steps.
        fault: name of a planted fault (tests.parity.faults), for tests of the tests.
        jacobi_iterations: R of each step; by default the config's.
        loss_mask: fp32 [global batch, s]; by default every token counts.
    """
    from tests.parity.faults import FAULTS

    distributed.initialize(config.parallel, config.training.seed)
    modules = build_model_chunks(config)
    load_weights(modules, checkpoint)
    if fault is not None:
        for module in modules:
            FAULTS[fault](module)
    model = wrap_data_parallel(modules, config)
    plan = training_plan(model.method, config.method.num_jacobi_iterations)
    logits = gather_logits(model, config, tokens[:, :-1], plan)
    optimizer, scheduler = build_optimizer(config, model.chunks)
    result = Measured(logits=logits, losses=[], grad_norms=[], gradients={}, weights={})
    for step in range(num_steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        if jacobi_iterations:
            plan = training_plan(model.method, jacobi_iterations[step])
        result.losses.append(run_step(model, config, tokens, plan, loss_mask))
        if step == 0:
            result.gradients = gather_gradients(model)
        result.grad_norms.append(update(optimizer))
        scheduler.step(increment=1)
    complete_parameters(model.chunks)
    result.weights = gather_weights(model)
    return result


def save_weights(config: RunConfig, state: dict[str, Tensor] | None, folder: str) -> None:
    """Write a one-rank checkpoint of weights: `state` (whole tensors), or the initial ones."""
    distributed.initialize(config.parallel, config.training.seed)
    model = build_model(config)
    if state is not None:
        model.load_state_dict(state, strict=False)
    dist_checkpointing.save(model.sharded_state_dict(), folder)


def load_weights(modules: list[PonderGPTModel], folder: str) -> None:
    """Load such a checkpoint into any layout."""
    request = {str(i): module.sharded_state_dict() for i, module in enumerate(modules)}
    loaded = dist_checkpointing.load(request, folder)
    for i, module in enumerate(modules):
        module.load_state_dict(loaded[str(i)])


def run_step(
    model: ParallelModel,
    config: RunConfig,
    tokens: Tensor,
    plan: PassPlan,
    loss_mask: Tensor | None = None,
) -> float:
    """Forward and backward of the whole batch spread over ranks; the mean loss over tokens."""
    ranks = distributed.ranks()
    if loss_mask is None:
        loss_mask = torch.ones(tokens.size(0), tokens.size(1) - 1)
    micro_batches = [
        {"tokens": rows[:, :-1].contiguous(), "labels": rows[:, 1:].contiguous(), "loss_mask": mask}
        for rows, mask in zip(
            tokens.chunk(ranks.data_parallel_size)[ranks.data_parallel_rank].split(
                config.training.micro_batch_size
            ),
            loss_mask.chunk(ranks.data_parallel_size)[ranks.data_parallel_rank].split(
                config.training.micro_batch_size
            ),
            strict=True,
        )
    ]
    totals = run_microbatches(
        model,
        iter(micro_batches),
        plan=plan,
        num_microbatches=len(micro_batches),
        micro_batch_size=config.training.micro_batch_size,
        seq_length=tokens.size(1) - 1,
        overlap_p2p_communication=config.parallel.overlap_p2p_communication,
    )
    loss, num_tokens = all_reduce_totals(totals).tolist()
    return loss / num_tokens


def update(optimizer: ChainedOptimizer) -> float:
    """Clip and step as `train.step.train_step` does; returns the gradient norm before clipping."""
    optimizer.prepare_grads()
    grad_norm = gradient_norm(optimizer)
    is_finite = torch.isfinite(grad_norm)
    assert is_finite
    clipped_update(optimizer, grad_norm, is_finite)
    return grad_norm.item()


@torch.no_grad()
def gather_logits(
    model: ParallelModel, config: RunConfig, tokens: Tensor, plan: PassPlan
) -> Tensor:
    """Logits [b, s, v] of the whole vocabulary in evaluation mode, through the real schedule."""
    captured: list[Tensor] = []
    last = model.modules[-1]
    compute_output = last.compute_output

    def capture(read: Tensor, labels: Tensor | None) -> Tensor:
        captured.append(compute_output(read, None).contiguous())
        return compute_output(read, labels)

    last.compute_output = capture  # type: ignore[method-assign]
    model.train(False)
    size = config.training.micro_batch_size
    mask = torch.ones(size, tokens.size(1))
    run_microbatches(
        model,
        iter([{"tokens": t, "labels": t, "loss_mask": mask} for t in tokens.split(size)]),
        plan=plan,
        num_microbatches=tokens.size(0) // size,
        micro_batch_size=size,
        seq_length=tokens.size(1),
        forward_only=True,
    )
    model.train()
    last.compute_output = compute_output  # type: ignore[method-assign]
    groups = distributed.process_groups()
    logits = torch.empty(0)
    if captured:
        local = torch.cat(captured)
        parts = [torch.empty_like(local) for _ in range(groups.tp.size())]
        dist.all_gather(parts, local, group=groups.tp)
        logits = torch.cat(parts, dim=-1)[..., : last.shape.vocab_size]
        if groups.cp.size() > 1:
            logits = gather_sequence(logits.transpose(0, 1), groups.cp).transpose(0, 1)
    by_stage: list[Tensor] = [torch.empty(0)] * groups.pp.size()
    dist.all_gather_object(by_stage, logits.cpu(), group=groups.pp)
    return by_stage[-1]


def gather_gradients(model: ParallelModel) -> dict[str, Tensor]:
    """Whole gradients by name; under the distributed optimizer first completes each buffer."""
    for chunk in model.chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            group = distributed.data_parallel_group()
            for buffer in chunk.buffers:
                for bucket in buffer.buckets:
                    mine = bucket.grad_data.chunk(group.size())[group.rank()].clone()
                    dist.all_gather(list(bucket.grad_data.chunk(group.size())), mine, group=group)
    return gather_stages(
        {
            name: gather_shards(parameter, parameter.main_grad)
            for name, parameter in model.named_parameters()
        }
    )


def gather_weights(model: ParallelModel) -> dict[str, Tensor]:
    """Whole weights by name."""
    return gather_stages(
        {
            name: gather_shards(parameter, parameter.detach())
            for name, parameter in model.named_parameters()
        }
    )


def gather_shards(parameter: Tensor, tensor: Tensor) -> Tensor:
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


def gather_stages(mine: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of all pipeline stages; NaN where two (with tied embeddings) do not agree."""
    group = distributed.process_groups().pp
    by_stage: list[dict[str, Tensor]] = [{}] * group.size()
    dist.all_gather_object(by_stage, mine, group=group)
    whole: dict[str, Tensor] = {}
    for tensors in by_stage:
        for name, tensor in tensors.items():
            agree = name not in whole or torch.equal(whole[name], tensor)
            whole[name] = tensor if agree else torch.full_like(tensor, torch.nan)
    return whole
