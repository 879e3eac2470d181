"""What bounds a layout, how far the run is from each bound, and what would make it fit a device.

No rule is stated here: a bound is found by asking whether training would accept the next size.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron_ponder.config.layout import flag_of
from megatron_ponder.errors import ConfigError
from megatron_ponder.planning.flops import chunk_flops
from megatron_ponder.planning.memory import stage_memory
from megatron_ponder.planning.run import GIB, PlannedRun
from megatron_ponder.ponder.plan import PassPlan

Settings = dict[str, Any]
KEEP_ALL: Settings = {
    "recompute_granularity": None,
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
    "recompute_num_passes": None,
}
"""Settings of a run that recomputes nothing."""


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


def find_limits(run: PlannedRun) -> list[dict[str, Any]]:
    """Bounds of tensor, pipeline, context and data parallelism, each with the others unchanged."""
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    limits = [*(_model_parallel_limit(run, name) for name in names), _data_parallel_limit(run)]
    return [dataclasses.asdict(limit) | {"binds": limit.binds} for limit in limits]


def _model_parallel_limit(run: PlannedRun, name: str) -> Limit:
    """The largest size that training accepts, with ranks taken from data parallelism."""
    now = run.config.to_flat_dict()[name]
    num_ranks = now * run.replicas
    most, refusals = now, {}
    for size in (size for size in range(now + 1, num_ranks + 1) if num_ranks % size == 0):
        try:
            run.changed(**{name: size})
            most = size
        except ConfigError as error:
            refusals[size] = str(error).split("\n  - ")[:2][-1]
    why = next((f"{size}: {why}" for size, why in refusals.items() if size > most), None)
    return Limit(name=name, now=now, most=most, why=why or "no data-parallel ranks are left")


def _data_parallel_limit(run: PlannedRun) -> Limit:
    """Micro-batches of the global batch."""
    training = run.config.training
    num_microbatches = training.global_batch_size // training.micro_batch_size
    return Limit(
        name="data_parallel_size",
        now=run.replicas,
        most=num_microbatches // run.num_stages,
        why=f"a step has {num_microbatches} micro-batches, and each replica needs a multiple of "
        f"{run.num_stages}",
    )


def find_remedies(run: PlannedRun, available_bytes: float) -> list[dict[str, Any]]:
    """Single changes to a run that is too large, with the memory of the largest stage after each.

    Args:
        run: the run.
        available_bytes: of a device.
    """
    remedies = []
    now = run.config.to_flat_dict()
    for flags, changes in _changes(run):
        if all(now[name] == value for name, value in changes.items()):
            continue
        try:
            changed = run.changed(**changes)
            total = max(stage.total for stage in stage_memory(changed))
        except ConfigError:
            continue  # this run cannot have it
        remedies.append(
            {
                "change": flags,
                "total_gib": total / GIB,
                "fits": total <= available_bytes,
                "recomputed_flops_share": chunk_flops(changed).recomputed_share,
            }
        )
    return sorted(remedies, key=lambda remedy: remedy["total_gib"])


def recompute_choices(plan: PassPlan) -> Iterator[Settings]:
    """What a run can recompute, as changes to KEEP_ALL; the cheapest first.

    Units of several layers, and of some layers, are left out.
    """
    yield {"recompute_granularity": "selective"}
    for n in range(1, len(plan.passes) - plan.first_grad_pass - 1):
        yield {"recompute_granularity": "pass", "recompute_num_passes": n}
    yield {"recompute_granularity": "pass"}
    yield {"recompute_granularity": "full"}


def _changes(run: PlannedRun) -> Iterator[tuple[str, Settings]]:
    """What could be changed, as flags and as settings."""
    parallel, training = run.config.parallel, run.config.training
    for settings in recompute_choices(run.plan):
        yield _flags(settings), KEEP_ALL | settings
    tensor_parallel = 2 * parallel.tensor_model_parallel_size
    changes: list[Settings] = [
        {"use_distributed_optimizer": True},
        {"bf16": True},
        {"micro_batch_size": training.micro_batch_size // 2},
        {"tensor_model_parallel_size": tensor_parallel, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2 * parallel.pipeline_model_parallel_size},
        {"context_parallel_size": 2 * parallel.context_parallel_size},
    ]
    for settings in changes:
        yield _flags(settings), settings


def _flags(settings: Settings) -> str:
    return " ".join(
        flag_of(name) if value is True else f"{flag_of(name)} {value}"
        for name, value in settings.items()
    )
