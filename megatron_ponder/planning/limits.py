"""What bounds a layout, how far the run is from each bound, and what would make it fit a device."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from megatron_ponder.config.layout import data_parallel_size, flag_of, padded_vocab_size
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.errors import ConfigError
from megatron_ponder.planning.memory import stage_memory
from megatron_ponder.planning.recompute import KEEP_ALL, recomputations
from megatron_ponder.planning.work import chunk_flops
from megatron_ponder.ponder.plan import PassPlan

BYTES_PER_GIB = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limit:
    """One bound."""

    name: str
    now: int
    """What the run has."""
    most: int
    """What it could have."""
    why: str

    @property
    def binds(self) -> bool:
        """Whether there is nothing left."""
        return self.now >= self.most


def find_limits(
    config: ResolvedConfig, world_size: int, num_microbatches: int
) -> list[dict[str, Any]]:
    """Bounds of tensor, pipeline, context and data parallelism, each with the others as they are.

    Args:
        config: resolved, so that no bound is passed.
        world_size: ranks.
        num_microbatches: of a step on each data-parallel rank.
    """
    replicas = data_parallel_size(config, world_size)
    limits = (
        _tensor(config, replicas),
        _pipeline(config, replicas, num_microbatches),
        _context(config, replicas),
        _data(config, replicas),
    )
    return [dataclasses.asdict(limit) | {"binds": limit.binds} for limit in limits]


def _largest(now: int, replicas: int, is_possible: Callable[[int], bool]) -> int:
    """The largest size that the ranks allow if data parallelism makes room for it."""
    sizes = range(now, now * replicas + 1)
    return max(s for s in sizes if s == now or (now * replicas % s == 0 and is_possible(s)))


def _tensor(config: ResolvedConfig, replicas: int) -> Limit:
    """Heads, widths, vocabulary."""
    model, now = config.model, config.parallel.tensor_model_parallel_size
    divided = math.gcd(
        model.num_attention_heads,
        model.num_query_groups,
        model.ffn_hidden_size,
        padded_vocab_size(model),
    )
    return Limit(
        name="tensor_model_parallel_size",
        now=now,
        most=_largest(now, replicas, lambda size: divided % size == 0),
        why=f"it must divide {model.num_attention_heads} heads, {model.num_query_groups} key/value "
        f"heads, the MLP width {model.ffn_hidden_size}, the padded vocabulary "
        f"{padded_vocab_size(model)} and the ranks",
    )


def _pipeline(config: ResolvedConfig, replicas: int, num_microbatches: int) -> Limit:
    """Layers and, with several chunks, micro-batches."""
    parallel, num_layers = config.parallel, config.model.num_layers
    now, chunks = (
        parallel.pipeline_model_parallel_size,
        parallel.num_virtual_stages_per_pipeline_rank,
    )

    def is_possible(size: int) -> bool:
        if num_layers % (size * chunks):
            return False
        # Fewer replicas have more micro-batches each.
        return num_microbatches * size // now % size == 0

    return Limit(
        name="pipeline_model_parallel_size",
        now=now,
        most=_largest(now, replicas, is_possible),
        why=f"{num_layers} layers in {chunks} chunk(s) per stage must divide by it, and the "
        f"micro-batches of a replica, {num_microbatches} now",
    )


def _context(config: ResolvedConfig, replicas: int) -> Limit:
    """Tokens of a sequence."""
    now, tokens = config.parallel.context_parallel_size, config.data.seq_length
    return Limit(
        name="context_parallel_size",
        now=now,
        most=_largest(now, replicas, lambda size: tokens % (2 * size) == 0),
        why=f"twice of it must divide the {tokens} tokens of a sequence",
    )


def _data(config: ResolvedConfig, replicas: int) -> Limit:
    """Micro-batches of the global batch."""
    training, stages = config.training, config.parallel.pipeline_model_parallel_size
    num_microbatches = training.global_batch_size // training.micro_batch_size
    return Limit(
        name="data_parallel_size",
        now=replicas,
        most=num_microbatches // stages,
        why=f"a step has {num_microbatches} micro-batches, and each replica needs a multiple of "
        f"{stages}",
    )


def find_remedies(
    config: ResolvedConfig, plan: PassPlan, world_size: int, available_bytes: float
) -> list[dict[str, Any]]:
    """Single changes to a run that is too large, with the memory of the fullest rank after each.

    Args:
        config: resolved.
        plan: the passes.
        world_size: ranks.
        available_bytes: of a device.
    """
    found = []
    now = config.to_flat_dict()
    for flags, changes in _changes(config, plan):
        if all(now[name] == value for name, value in changes.items()):
            continue
        try:
            changed = resolve(config.replaced(**changes), world_size=world_size)
            replicas = data_parallel_size(changed, world_size) * changed.training.micro_batch_size
            num_microbatches = changed.training.global_batch_size // replicas
            grad_plan = plan.with_grad_passes(changed.method.jacobi_grad_passes)
            stages = stage_memory(changed, grad_plan, world_size, num_microbatches)
        except ConfigError:
            continue  # this run cannot have it
        total = max(stage.total for stage in stages)
        found.append(
            {
                "change": flags,
                "total_gib": total / BYTES_PER_GIB,
                "fits": total <= available_bytes,
                "recomputed_flops_share": chunk_flops(changed, grad_plan).recomputed_share,
            }
        )
    return sorted(found, key=lambda remedy: remedy["total_gib"])


def _changes(config: ResolvedConfig, plan: PassPlan) -> Iterator[tuple[str, dict[str, Any]]]:
    """What could be changed, as flags and as settings."""
    for settings in recomputations(plan):
        flags = " ".join(f"{flag_of(name)} {value}" for name, value in settings.items())
        yield flags, KEEP_ALL | settings
    parallel, training = config.parallel, config.training
    if not parallel.use_distributed_optimizer:
        yield "--use-distributed-optimizer", {"use_distributed_optimizer": True}
    if not training.bf16:
        yield "--bf16", {"bf16": True}
    if training.micro_batch_size > 1:
        half = training.micro_batch_size // 2
        yield f"--micro-batch-size {half}", {"micro_batch_size": half}
    size = 2 * parallel.tensor_model_parallel_size
    yield (
        f"--tensor-model-parallel-size {size} --sequence-parallel",
        {"tensor_model_parallel_size": size, "sequence_parallel": True},
    )
    size = 2 * parallel.pipeline_model_parallel_size
    yield f"--pipeline-model-parallel-size {size}", {"pipeline_model_parallel_size": size}
    size = 2 * parallel.context_parallel_size
    yield f"--context-parallel-size {size}", {"context_parallel_size": size}
