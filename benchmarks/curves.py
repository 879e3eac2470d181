"""What a training step costs as a function of one setting at a time: time and memory.

Every point is a ratio to the base, whose steps are timed in turns with the point's, round by round,
in the same process; points on several ranks take turns with the base's process. So a machine that
slows down slows both. Beside each ratio stands what is predicted on paper:

    time     FLOPs of the step (model/size.py), on a pipeline through its simulated schedule
    memory   the planner's weights, gradients, optimizer state and activations of the fullest rank

A prediction by FLOPs knows nothing of the optimizer, of operations bound by memory or by the host,
and of communication: where measured and predicted part, that is what is seen. Memory is measured to
the byte (step_memory.py).

Left out: data loading (tokens are random), evaluation, saving.
"""

import contextlib
import dataclasses
import math
import os
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.curves_options import CurvesBenchmarkOptions, Variable
from benchmarks.curves_process import RankGroup, rank_group
from benchmarks.train import environment
from megatron_ponder import log
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
"""The base of a run that says nothing about its model: seconds per point on one core."""
METHODS = (("vanilla", 0), ("ponderlm2", 1), ("ponderlm", 3), ("loop", 3), ("pause", 3))
"""With the K of the paper's table 3."""
PROFILED_STEPS = 2
"""Steps' time that a step with measured memory takes, about."""
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
    """Resolved."""
    world_size: int = 1

    @property
    def run(self) -> "Run":
        """What is run: points of several curves may be one run, and the base is one of them."""
        return self.config, self.world_size


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """A step on paper."""

    flops: float
    """Of the whole step, over all ranks."""
    seconds: float
    """At an arbitrary rate: of use as a ratio only."""
    memory_bytes: int
    """Of the fullest rank."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Measured:
    """One point's and, in turns with it, the base's."""

    ms: list[float]
    base_ms: list[float]
    memory_bytes: int


def benchmark_curves(options: CurvesBenchmarkOptions, config: RunConfig) -> dict[str, Any]:
    """Measure every point of every variable.

    Args:
        options: which, and how often.
        config: the base as given; a small one if it says nothing about the model.

    Returns:
        What is printed, by name: `base`, `curves` (points by variable), what could not run, and
        what it ran on.

    Raises:
        ConfigError: settings of a point do not fit together.
    """
    config = with_defaults(options, config)
    base = resolve(config, world_size=1)
    curves = {name: curve_points(name, options, config) for name in options.variables}
    expected = predict(base, 1)
    load_at_start = os.getloadavg()
    skipped: dict[str, str] = {}
    for points in curves.values():
        for point in [p for p in points if p.world_size > num_ranks_here()]:
            points.remove(point)
            skipped[f"{point.world_size} ranks"] = f"there is room for {num_ranks_here()}"
    measured = _measure_all(options, base, curves)
    at_base = measured[base, 1]
    return environment(base) | {
        "threads": torch.get_num_threads() if torch.cuda.is_available() else 1,
        "load_average": {"at_start": load_at_start, "at_end": os.getloadavg()},
        "rounds": options.rounds,
        "steps_per_round": options.steps,
        "skipped": skipped,
        "base": {
            "ms_per_step": statistics.median(at_base.ms),
            "memory_bytes": at_base.memory_bytes,
            "predicted_memory_bytes": expected.memory_bytes,
            "flops": expected.flops,
        },
        "curves": {
            name: [
                describe_point(point, expected, measured[point.run], at_base.memory_bytes)
                for point in points
            ]
            for name, points in curves.items()
        },
    }


def with_defaults(options: CurvesBenchmarkOptions, config: RunConfig) -> RunConfig:
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


def num_ranks_here() -> int:
    """Ranks that can have a GPU, or a core, of their own."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0))


def curve_points(
    variable: Variable, options: CurvesBenchmarkOptions, config: RunConfig
) -> list[Point]:
    """The runs of a curve.

    Args:
        variable: what is varied.
        options: through which values.
        config: the base, not resolved.

    Raises:
        ConfigError: settings of a point do not fit together.
    """
    points = []
    for value, changes in _VALUES[variable](options, config):
        is_spread = variable in ("data-parallel", "pipeline")
        world_size = int(value) if is_spread else 1
        try:
            resolved = resolve(config.replaced(**changes), world_size=world_size)
        except ConfigError as error:
            raise ConfigError(f"--variables {variable}, {value}: {error}") from None
        points.append(Point(value=value, changes=changes, config=resolved, world_size=world_size))
    return points


Values = Iterator[tuple[float | str, Changes]]


def _thoughts(options: CurvesBenchmarkOptions, config: RunConfig) -> Values:
    for k in options.k_values:
        yield k, {"num_latent_thoughts": k}


def _jacobi_iterations(options: CurvesBenchmarkOptions, config: RunConfig) -> Values:
    for r in options.r_values:
        yield r, {"num_jacobi_iterations": r}


def _multiples(*names: str) -> Callable[[CurvesBenchmarkOptions, RunConfig], Values]:
    """Multiples of several settings; the value is the first one's."""

    def values(options: CurvesBenchmarkOptions, config: RunConfig) -> Values:
        flat = config.to_flat_dict()
        given = {name: flat[name] for name in names if flat[name] is not None}
        for factor in options.factors:
            changes = {name: max(1, round(factor * size)) for name, size in given.items()}
            yield changes[names[0]], changes

    return values


def _methods(options: CurvesBenchmarkOptions, config: RunConfig) -> Values:
    for method, k in METHODS:
        yield f"{method} K={k}" if k else method, {"method": method, "num_latent_thoughts": k}


def _recomputation(options: CurvesBenchmarkOptions, config: RunConfig) -> Values:
    yield "none", KEEP_ALL
    for settings in recompute_choices(possible_plans(load_method(config.method))[-1]):
        yield " ".join(map(str, settings.values())), KEEP_ALL | settings


def _replicas(options: CurvesBenchmarkOptions, config: RunConfig) -> Values:
    for number in options.ranks:
        yield number, {}


def _stages(options: CurvesBenchmarkOptions, config: RunConfig) -> Values:
    for number in options.ranks:
        yield number, {"pipeline_model_parallel_size": number}


_VALUES: dict[Variable, Callable[[CurvesBenchmarkOptions, RunConfig], Values]] = {
    "thoughts": _thoughts,
    "jacobi-iterations": _jacobi_iterations,
    "seq-length": _multiples("seq_length"),
    "width": _multiples(
        "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"
    ),
    "depth": _multiples("num_layers"),
    "micro-batch": _multiples("micro_batch_size", "global_batch_size"),
    "method": _methods,
    "recomputation": _recomputation,
    "data-parallel": _replicas,
    "pipeline": _stages,
}


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


def _measure_all(
    options: CurvesBenchmarkOptions, base: ResolvedConfig, curves: dict[Variable, list[Point]]
) -> dict[Run, _Measured]:
    """Every run once."""
    points = {p.run: p for some in curves.values() for p in some if p.run != (base, 1)}
    base_s = predict(base, 1).seconds
    times = {run: predict(*run).seconds / base_s for run in points}
    per_side = options.rounds * options.steps
    extra = options.warmup_steps + PROFILED_STEPS
    total = (
        extra + per_side + sum(per_side + (per_side + extra) * ratio for ratio in times.values())
    )
    found: dict[Run, _Measured] = {}
    with contextlib.ExitStack() as stack:
        # A step of the base is the unit of progress: points cost what they are predicted to.
        bar = stack.enter_context(
            log.progress(math.ceil(total), "curves", " base steps", unit_scale=True)
        )
        groups = {1: stack.enter_context(rank_group(1))}
        groups[1].build("base", base)
        groups[1].take_steps("base", options.warmup_steps)
        memory = _memory(groups[1], "base")
        ms = [_step_ms(groups[1], "base", options.steps) for _ in range(options.rounds)]
        found[base, 1] = _Measured(ms=ms, base_ms=ms, memory_bytes=memory)
        bar.update(extra + per_side)
        for run, point in points.items():
            if point.world_size not in groups:
                groups[point.world_size] = stack.enter_context(rank_group(point.world_size))
            found[run] = _measure(options, groups, point)
            bar.update(per_side + (per_side + extra) * times[run])
    return found


def _measure(
    options: CurvesBenchmarkOptions, groups: dict[int, RankGroup], point: Point
) -> _Measured:
    """One point, in turns with the base."""
    group = groups[point.world_size]
    group.build("point", point.config)
    group.take_steps("point", options.warmup_steps)
    memory = _memory(group, "point")
    ms, base_ms = [], []
    for _ in range(options.rounds):
        base_ms.append(_step_ms(groups[1], "base", options.steps))
        ms.append(_step_ms(group, "point", options.steps))
    group.drop("point")
    return _Measured(ms=ms, base_ms=base_ms, memory_bytes=memory)


def _step_ms(group: RankGroup, name: str, steps: int) -> float:
    return 1e3 * group.take_steps(name, steps) / steps


def _memory(group: RankGroup, name: str) -> int:
    """Of the fullest rank."""
    return max(held + added for held, added in group.measure_memory(name))


def describe_point(
    point: Point,
    base: Prediction,
    measured: _Measured,
    base_memory_bytes: int,
) -> dict[str, Any]:
    """A point's figures, as ratios to the base.

    Args:
        point: what was run.
        base: the base's step on paper.
        measured: times in turns with the base's, and memory.
        base_memory_bytes: the base's measured memory.
    """
    predicted = predict(*point.run)
    ratios = [mine / base_ms for mine, base_ms in zip(measured.ms, measured.base_ms, strict=True)]
    return {
        "value": point.value,
        "changes": point.changes,
        "world_size": point.world_size,
        "ms_per_step": statistics.median(measured.ms),
        "ms_per_step_of_rounds": measured.ms,
        "base_ms_per_step_of_rounds": measured.base_ms,
        "memory_bytes": measured.memory_bytes,
        "predicted_memory_bytes": predicted.memory_bytes,
        "flops": predicted.flops,
        "time": {
            "median": statistics.median(ratios),
            "least": min(ratios),
            "largest": max(ratios),
            "quartiles": _quartiles(ratios),
            # Of each side's fastest round, which other processes disturbed least.
            "of_fastest": min(measured.ms) / min(measured.base_ms),
            "predicted": predicted.seconds / base.seconds,
        },
        "memory": {
            "measured": measured.memory_bytes / base_memory_bytes,
            "predicted": predicted.memory_bytes / base.memory_bytes,
        },
    }


def _quartiles(ratios: list[float]) -> list[float]:
    """First and third: what a few disturbed rounds do not move."""
    if len(ratios) == 1:
        return [*ratios, *ratios]
    first, _, third = statistics.quantiles(ratios, n=4, method="inclusive")
    return [first, third]
