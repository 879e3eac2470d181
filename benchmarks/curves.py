"""Time and memory of a training step as functions of one setting at a time.

Every point is a ratio to the base, whose steps are timed in turns with the point's, round by round
in the same process; points on several ranks take turns with the base's process. So a slowdown of
the machine hits both. Each ratio is compared with a prediction:

    time     FLOPs of the step (model/size.py), on a pipeline through its simulated schedule
    memory   the planner's weights, gradients, optimizer state and activations, of the fullest rank

FLOPs know nothing of the optimizer, of operations bound by memory or by the host, or of
communication; a difference shows those. Memory is measured to the byte (step_memory.py).

Left out: data loading (tokens are random), evaluation, saving.
"""

import contextlib
import dataclasses
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from benchmarks import report
from benchmarks.commands import CurvesOptions, Variable
from benchmarks.curve_points import Point, Prediction, Run, curve_points, predict, with_defaults
from benchmarks.processes import Processes, processes
from benchmarks.steps import build_ours, drop, measure_memory, take_steps
from megatron_ponder import log
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.figures import save_png

PROFILED_STEPS = 2
"""Approximate cost of a step whose memory is measured, in steps."""
TITLES = {
    "thoughts": "latent thoughts K",
    "jacobi-iterations": "Jacobi iterations R",
    "seq-length": "tokens in a sequence",
    "width": "hidden size (heads and MLP with it)",
    "depth": "layers",
    "micro-batch": "sequences in a micro-batch (batch with it)",
    "method": "method",
    "recomputation": "recomputation",
    "data-parallel": "data-parallel ranks, same batch",
    "pipeline": "pipeline ranks, same batch",
}
LOG_SCALED = ("seq-length", "width", "depth", "micro-batch")
TIME, MEMORY = "#d97706", "#2563eb"
MIB = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Times of a point and, in turns with it, of the base, per round; memory of the point."""

    ms: list[float]
    base_ms: list[float]
    memory_bytes: int


def measure(options: CurvesOptions, config: RunConfig) -> dict[str, Any]:
    """Measure every point of every variable.

    Args:
        options: which, and how often.
        config: the base as given; its model is small if no setting of the model is given.

    Returns:
        `base`, `curves` (points by variable), `skipped`, and the environment.

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
    return report.environment(base) | {
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


def num_ranks_here() -> int:
    """Ranks that can each have a GPU, or a core."""
    if torch.cuda.is_available():
        return torch.cuda.device_count()
    return len(os.sched_getaffinity(0))


def _measure_all(
    options: CurvesOptions, base: ResolvedConfig, curves: dict[Variable, list[Point]]
) -> dict[Run, Measured]:
    """Every run once."""
    points = {p.run: p for some in curves.values() for p in some if p.run != (base, 1)}
    base_s = predict(base, 1).seconds
    times = {run: predict(*run).seconds / base_s for run in points}
    per_side = options.rounds * options.steps
    extra = options.warmup_steps + PROFILED_STEPS
    total = (
        extra + per_side + sum(per_side + (per_side + extra) * ratio for ratio in times.values())
    )
    found: dict[Run, Measured] = {}
    with contextlib.ExitStack() as stack:
        # Progress counts steps of the base; a point counts for what it is predicted to cost.
        bar = stack.enter_context(
            log.progress(math.ceil(total), "curves", " base steps", unit_scale=True)
        )
        groups = {1: stack.enter_context(_ranks(1))}
        memory = _build(options, groups[1], "base", base)
        ms = [_step_ms(groups[1], "base", options.steps) for _ in range(options.rounds)]
        found[base, 1] = Measured(ms=ms, base_ms=ms, memory_bytes=memory)
        bar.update(extra + per_side)
        for run, point in points.items():
            if point.world_size not in groups:
                groups[point.world_size] = stack.enter_context(_ranks(point.world_size))
            found[run] = _measure_point(options, groups, point)
            bar.update(per_side + (per_side + extra) * times[run])
    return found


def _ranks(size: int) -> contextlib.AbstractContextManager[Processes]:
    """Ranks with one thread each on the CPU."""
    return processes("a rank", size, None if torch.cuda.is_available() else 1)


def _build(options: CurvesOptions, group: Processes, name: str, config: ResolvedConfig) -> int:
    """Build a model and warm it up; the largest peak memory of a rank, in bytes."""
    group.run(build_ours, name, config)
    group.run(take_steps, name, 1, options.warmup_steps)
    return int(max(group.run(measure_memory, name)))


def _measure_point(options: CurvesOptions, groups: dict[int, Processes], point: Point) -> Measured:
    """One point, in turns with the base."""
    group = groups[point.world_size]
    memory = _build(options, group, "point", point.config)
    ms, base_ms = [], []
    for _ in range(options.rounds):
        base_ms.append(_step_ms(groups[1], "base", options.steps))
        ms.append(_step_ms(group, "point", options.steps))
    group.run(drop, "point")
    return Measured(ms=ms, base_ms=base_ms, memory_bytes=memory)


def _step_ms(group: Processes, name: str, steps: int) -> float:
    """Time of a step on the slowest rank."""
    slowest_s = max(float(seconds) for _, seconds, _ in group.run(take_steps, name, 1, steps))
    return 1e3 * slowest_s / steps


def describe_point(
    point: Point,
    base: Prediction,
    measured: Measured,
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
            **report.spread(ratios),
            "quartiles": _quartiles(ratios),
            # Of the fastest round of each side, which other processes disturbed least.
            "of_fastest": min(measured.ms) / min(measured.base_ms),
            "predicted": predicted.seconds / base.seconds,
        },
        "memory": {
            "measured": measured.memory_bytes / base_memory_bytes,
            "predicted": predicted.memory_bytes / base.memory_bytes,
        },
    }


def _quartiles(ratios: list[float]) -> list[float]:
    """First and third; a few disturbed rounds do not move them."""
    if len(ratios) == 1:
        return [*ratios, *ratios]
    first, _, third = statistics.quantiles(ratios, n=4, method="inclusive")
    return [first, third]


def as_text(result: dict[str, Any]) -> str:
    """A result as a table per variable."""
    base, load = result["base"], result["load_average"]
    parts = [
        f"{report.heading(result)}; load {load['at_start'][0]:.1f} at the start, "
        f"{load['at_end'][0]:.1f} at the end\n"
        f"base: {base['ms_per_step']:.1f} ms/step, {base['memory_bytes'] / MIB:.1f} MiB "
        f"({base['predicted_memory_bytes'] / MIB:.1f} predicted), {base['flops'] / 1e9:.4g} GFLOP\n"
        f"Ratios to the base; time is the median of {result['rounds']} rounds (least to largest), "
        "and of the fastest round of both.",
    ]
    for variable, points in result["curves"].items():
        rows = []
        for point in points:
            time, memory = point["time"], point["memory"]
            ratios = (time["of_fastest"], time["predicted"], *memory.values())
            spread = f"({time['least']:.2f} to {time['largest']:.2f})"
            row = (point["value"], f"{time['median']:.2f}", spread)
            rows.append((*row, *(f"{ratio:.2f}" for ratio in ratios)))
        header = (TITLES[variable], "time", "", "fastest", "by FLOPs", "memory", "planned")
        parts.append(report.table(header, rows))
    parts += [f"left out: {what}: {why}" for what, why in result["skipped"].items()]
    return "\n\n".join(parts)


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel for each variable, as a PNG."""
    figure, panels = report.new_panels(len(result["curves"]))
    for axes, (variable, points) in zip(panels, result["curves"].items(), strict=True):
        if points:
            _draw_curve(axes, variable, points)
        axes.set_title(TITLES[variable], loc="left", fontsize=10)
    config = result["config"]
    figure.suptitle(
        f"time and memory of a training step, as ratios to the base: {config['num_layers']} layers "
        f"of width {config['hidden_size']}, {config['seq_length']} tokens,\n{config['method']} "
        f"K={config['num_latent_thoughts']} R={config['num_jacobi_iterations']}, "
        f"{'bf16' if config['bf16'] else 'fp32'}, {result['device']}, {result['date']}",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False)
    save_png(figure, path)


def _draw_curve(axes: Axes, variable: str, points: Sequence[dict[str, Any]]) -> None:
    """Measured ratios as points, with the middle half of the rounds; predicted ones as lines."""
    values = [point["value"] for point in points]
    is_named = isinstance(values[0], str)
    places = list(range(len(values))) if is_named else values
    line: dict[str, Any] = {"linestyle": "--", "linewidth": 1.2}
    if is_named:
        line = {"linestyle": "none", "marker": "_", "markersize": 16}
    time, memory = ([point[key] for point in points] for key in ("time", "memory"))
    median = [ratio["median"] for ratio in time]
    bars = [
        [ratio["median"] - ratio["quartiles"][0] for ratio in time],
        [ratio["quartiles"][1] - ratio["median"] for ratio in time],
    ]
    label = "time, measured (bar: middle half of rounds)"
    marks: dict[str, Any] = {"linestyle": "none", "markersize": 5}
    axes.errorbar(places, median, bars, marker="o", capsize=3, color=TIME, label=label, **marks)
    predicted = [ratio["predicted"] for ratio in time]
    axes.plot(places, predicted, color=TIME, label="time, by FLOPs", **line)
    measured = [ratio["measured"] for ratio in memory]
    axes.plot(places, measured, marker="s", color=MEMORY, label="memory, measured", **marks)
    planned = [ratio["predicted"] for ratio in memory]
    axes.plot(places, planned, color=MEMORY, label="memory, planned", **line)
    if variable in LOG_SCALED:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.set_xticks(places, [str(value).replace(" ", "\n") for value in values], fontsize=8)
    axes.margins(x=0.1)
