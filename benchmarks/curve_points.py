"""Points of cost curves: which runs a curve goes through, and what each should cost on paper.

Left out: running them (curves.py).
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

from benchmarks.commands import CurvesOptions, Variable
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.config.schema import CheckpointConfig, ModelConfig, RunConfig
from megatron_ponder.errors import ConfigError
from megatron_ponder.model.size import forward_flops
from megatron_ponder.planning.flops import simulate_step
from megatron_ponder.planning.limits import KEEP_ALL, recompute_choices
from megatron_ponder.planning.memory import stage_memory
from megatron_ponder.planning.run import PlannedRun
from megatron_ponder.ponder.method import load_method
from megatron_ponder.ponder.training_plan import possible_plans

SMALL_BASE: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 128,
    "ffn_hidden_size": 352,
    "num_attention_heads": 4,
    "vocab_size": 1024,
    "seq_length": 128,
    "micro_batch_size": 2,
    "num_jacobi_iterations": 2,
}
"""The base where no setting of the model is given: seconds per point on one core."""
METHODS = (("vanilla", 0), ("ponderlm2", 1), ("ponderlm", 3), ("loop", 3), ("pause", 3))
"""With the K of the paper's table 3."""
Changes = dict[str, Any]
Run = tuple[ResolvedConfig, int]
"""A resolved config, and its number of ranks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """One run on a curve."""

    value: float | str
    changes: Changes
    """Settings that differ from the base's."""
    config: ResolvedConfig
    world_size: int = 1

    @property
    def run(self) -> "Run":
        """Equal for points that are measured once; the base is a point of every curve."""
        return self.config, self.world_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """A step on paper."""

    flops: float
    """Of the whole step, over all ranks."""
    seconds: float
    """At an arbitrary rate: only ratios mean something."""
    memory_bytes: int
    """Of the fullest rank."""


def with_defaults(options: CurvesOptions, config: RunConfig) -> RunConfig:
    """The base with a small model if none is given, and a batch that all ranks can share.

    Raises:
        ConfigError: a random R, or more than one rank.
    """
    if config.method.random_jacobi_iterations:
        raise ConfigError("benchmark curves needs one R: --no-random-jacobi-iterations.")
    config = dataclasses.replace(config, checkpoint=CheckpointConfig())
    if config.model == ModelConfig():
        given, unsaid = config.to_flat_dict(), RunConfig().to_flat_dict()
        small = {key: v for key, v in SMALL_BASE.items() if given[key] == unsaid[key]}
        config = config.replaced(**small)
    if config.training.global_batch_size is None:
        num_microbatches = max(2, *options.ranks)
        micro_batch_size = config.training.micro_batch_size
        config = config.replaced(global_batch_size=num_microbatches * micro_batch_size)
    return config


def curve_points(variable: Variable, options: CurvesOptions, config: RunConfig) -> list[Point]:
    """The runs of a curve.

    Args:
        variable: what is varied.
        options: through which values.
        config: the base, not resolved.

    Raises:
        ConfigError: settings of a point do not fit together.
    """
    points = []
    for value, changes in _values(variable, options, config):
        is_spread = variable in ("data-parallel", "pipeline")
        world_size = int(value) if is_spread else 1
        try:
            resolved = resolve(config.replaced(**changes), world_size=world_size)
        except ConfigError as error:
            raise ConfigError(f"--variables {variable}, {value}: {error}") from None
        points.append(Point(value=value, changes=changes, config=resolved, world_size=world_size))
    return points


MULTIPLES: dict[str, tuple[str, ...]] = {
    "seq-length": ("seq_length",),
    "width": ("hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
    "depth": ("num_layers",),
    "micro-batch": ("micro_batch_size", "global_batch_size"),
}
"""Settings that --factors multiplies; the first one gives the value of the point."""


def _values(
    variable: Variable, options: CurvesOptions, config: RunConfig
) -> Iterator[tuple[float | str, Changes]]:
    """Value of each point, and the settings that it changes."""
    match variable:
        case "thoughts":
            yield from ((k, {"num_latent_thoughts": k}) for k in options.k_values)
        case "jacobi-iterations":
            yield from ((r, {"num_jacobi_iterations": r}) for r in options.r_values)
        case "method":
            for method, k in METHODS:
                name = f"{method} K={k}" if k else method
                yield name, {"method": method, "num_latent_thoughts": k}
        case "recomputation":
            yield "none", KEEP_ALL
            for settings in recompute_choices(possible_plans(load_method(config.method))[-1]):
                yield " ".join(map(str, settings.values())), KEEP_ALL | settings
        case "data-parallel":
            yield from ((number, {}) for number in options.ranks)
        case "pipeline":
            yield from ((n, {"pipeline_model_parallel_size": n}) for n in options.ranks)
        case _:
            flat = config.to_flat_dict()
            given = {n: flat[n] for n in MULTIPLES[variable] if flat[n] is not None}
            for factor in options.factors:
                changes = {name: max(1, round(factor * size)) for name, size in given.items()}
                yield changes[MULTIPLES[variable][0]], changes


def predict(config: ResolvedConfig, world_size: int) -> Prediction:
    """A step on paper.

    Args:
        config: resolved.
        world_size: ranks.
    """
    run = PlannedRun(config, world_size)
    flops = forward_flops(config.model, run.plan, config.data.seq_length).training
    return Prediction(
        flops=flops * config.training.global_batch_size,
        seconds=simulate_step(run, tflops=100.0).makespan_s,
        memory_bytes=max(stage.total for stage in stage_memory(run)),
    )
