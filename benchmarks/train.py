"""Training speed and memory, beside a baseline that does the same work in the same run.

The baseline is the method on stock transformers layers (`stock_reference`). Each side has its own
process; both take the same steps on the same random tokens from the same weights. On the CPU they
are timed in turns (ours, baseline, ours, ...), so that a slowdown of the machine hits both. A GPU
is steady and its memory limits the batch: there the sides run one after the other, each with the
whole device. The losses of the first steps must agree.

Phases, traces and passes are measured in steps of their own, after the timed ones. Each R value
given is measured in a fresh process. Left out: more than one process per side, and data loading.
"""

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import report, roofline
from benchmarks.commands import TrainOptions
from benchmarks.phases import time_phases, trace_step
from benchmarks.processes import Processes, processes
from benchmarks.steps import build_ours, build_reference_side, peak_gib, take_steps
from benchmarks.stock_reference import check_settings
from megatron_ponder import log
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.config.schema import CheckpointConfig, RunConfig
from megatron_ponder.figures import save_png
from megatron_ponder.model.size import forward_flops
from megatron_ponder.ponder.method import load_method
from megatron_ponder.ponder.training_plan import training_plan
from megatron_ponder.runtime.device import device
from megatron_ponder.runtime.peak_flops import peak_tflops

LOSS_TOLERANCE = {False: 1e-4, True: 5e-2}
"""By bf16: between the first losses of the two sides; autocast rounds elsewhere than we do."""
MFU_DEFINITION = (
    "model FLOPs (matmuls of all passes, causal attention as half of the square, backward twice "
    "the forward, nothing recomputed) per second over the device's dense bf16 peak"
)
PHASE_STEPS = 3
"""Steps whose phases are timed; the fastest is reported."""


def measure(options: TrainOptions, config: RunConfig) -> dict[str, Any]:
    """Measure a config.

    Args:
        options: how long, and what besides.
        config: as given; resolved here for one process.

    Returns:
        `ours`, the baseline under its name, `speedup` (its time over ours, above 1: ours is
        faster; the median over rounds, with the least and the largest), on the CPU
        `speedup_cpu_time` (the same in CPU time, which other processes disturb less), `roofline`,
        `by_r`, and the environment.

    Raises:
        PonderError: the settings cannot work, or the baseline does not have them.
    """
    config = dataclasses.replace(config, checkpoint=CheckpointConfig())
    config = resolve(config, world_size=1)
    baseline = options.baseline
    names = ["ours"] if baseline == "none" else ["ours", baseline]
    if baseline != "none":
        check_settings(config)
    rounds = _measure_sides(config, names, options)
    result = report.environment(config) | {
        "baseline": baseline,
        "peak_tflops": peak_tflops(bf16=config.training.bf16),
        "mfu_definition": MFU_DEFINITION,
    }
    for name in names:
        result[name] = _summary(config, rounds[name], options.steps)
    if baseline != "none":
        losses = [result[name]["first_loss"] for name in names]
        if not math.isclose(*losses, abs_tol=LOSS_TOLERANCE[config.training.bf16]):
            raise AssertionError(f"the two sides compute different things: losses {losses}")
        ours, theirs = rounds["ours"], rounds[baseline]
        result["speedup"] = _speedup(ours.ms, theirs.ms)
        if device().type == "cpu":
            result["speedup_cpu_time"] = _speedup(ours.cpu_ms, theirs.cpu_ms)
    result["roofline"] = rounds["ours"].roofline
    result["by_r"] = [_measure_r(config, r, options) for r in options.r_values]
    return result


@dataclasses.dataclass(kw_only=True)
class _Rounds:
    """Measurements of one side."""

    first_loss: float = math.nan
    ms: list[float] = dataclasses.field(default_factory=list)
    """Milliseconds per step of each round."""
    cpu_ms: list[float] = dataclasses.field(default_factory=list)
    """The same in CPU time."""
    before_gib: float = 0.0
    """Memory before the model was built: interpreter and libraries."""
    peak_gib: float = 0.0
    phases: dict[str, float] = dataclasses.field(default_factory=dict)
    roofline: dict[str, Any] | None = None


def _measure_sides(
    config: ResolvedConfig, names: Sequence[str], options: TrainOptions
) -> dict[str, _Rounds]:
    """Time the sides: on the CPU alternately, on a GPU one after the other."""
    groups = [[name] for name in names] if device().type == "cuda" else [list(names)]
    rounds = {name: _Rounds() for name in names}
    starts_from_reference = len(names) > 1
    with log.progress(len(names) * (options.rounds + 2), "benchmark", " rounds") as bar:
        for group in groups:
            with contextlib.ExitStack() as stack:
                sides = {name: stack.enter_context(processes(name)) for name in group}
                for name, side in sides.items():
                    build = (
                        (build_ours, name, config, starts_from_reference)
                        if name == "ours"
                        else (build_reference_side, name, config)
                    )
                    (rounds[name].before_gib,) = side.run(*build)
                _time_rounds(sides, rounds, options, bar)
                for name, side in sides.items():
                    (rounds[name].peak_gib,) = side.run(peak_gib)
                    (rounds[name].phases,) = side.run(time_phases, name, PHASE_STEPS)
                    bar.update()
                if "ours" in sides and options.profile:
                    sides["ours"].run(trace_step, "ours", options.profile)
                if "ours" in sides and options.roofline:
                    (rounds["ours"].roofline,) = sides["ours"].run(roofline.measure_passes, "ours")
    return rounds


def _time_rounds(
    sides: dict[str, Processes], rounds: dict[str, _Rounds], options: TrainOptions, bar: "tqdm[Any]"
) -> None:
    """Warm-up, then the rounds in turns."""
    for name, side in sides.items():
        ((losses, *_),) = side.run(take_steps, name, 1, options.warmup_steps)
        rounds[name].first_loss = losses[0]
        bar.update()
    for number in range(options.rounds):
        first_iteration = 1 + options.warmup_steps + number * options.steps
        for name, side in sides.items():
            ((_, seconds, cpu_s),) = side.run(take_steps, name, first_iteration, options.steps)
            rounds[name].ms.append(1e3 * seconds / options.steps)
            rounds[name].cpu_ms.append(1e3 * cpu_s / options.steps)
            bar.update()


def _measure_r(config: ResolvedConfig, r: int, options: TrainOptions) -> dict[str, Any]:
    """Our side at one R, in a fresh process."""
    config = config.replaced(num_jacobi_iterations=r, random_jacobi_iterations=False)
    options = dataclasses.replace(options, profile=None, roofline=False)
    (rounds,) = _measure_sides(config, ["ours"], options).values()
    summary = _summary(config, rounds, options.steps)
    keys = ("ms_per_step", "peak_memory_gib", "step_memory_gib", "tflops")
    return {"num_jacobi_iterations": r} | {key: summary[key] for key in keys}


def _speedup(ours_ms: list[float], theirs_ms: list[float]) -> dict[str, float]:
    """The baseline's time over ours, round by round."""
    ratios = [theirs / ours for ours, theirs in zip(ours_ms, theirs_ms, strict=True)]
    return report.spread(ratios)


def _summary(config: ResolvedConfig, rounds: _Rounds, steps_per_round: int) -> dict[str, Any]:
    """Figures of one side; rates are of the median round."""
    training = config.training
    ms = statistics.median(rounds.ms)
    tokens = training.global_batch_size * config.data.seq_length
    plan = training_plan(load_method(config.method), config.method.num_jacobi_iterations)
    flops = forward_flops(config.model, plan, config.data.seq_length).training
    tflops, peak = None, peak_tflops(bf16=training.bf16)
    # Timed steps with a random R have no single FLOP count, so no rate is reported for them.
    if not config.method.random_jacobi_iterations:
        tflops = flops * training.global_batch_size / ms * 1e3 / 1e12
    return {
        "ms_per_step": ms,
        "ms_per_step_of_rounds": rounds.ms,
        "tokens_per_s": tokens / ms * 1e3,
        "tflops": tflops,
        "mfu": None if tflops is None or peak is None else tflops / peak,
        "phases_ms": rounds.phases,
        "peak_memory_gib": rounds.peak_gib,
        "step_memory_gib": rounds.peak_gib - rounds.before_gib,
        "first_loss": rounds.first_loss,
        "steps": steps_per_round * len(rounds.ms),
    }


def as_text(result: dict[str, Any]) -> str:
    """A result as tables."""
    names = [name for name in ("ours", result["baseline"]) if name in result]
    sides = {name: result[name] for name in names}
    keys = ("ms_per_step", "tokens_per_s", "tflops")
    rows = [
        (n, *(s[key] for key in keys), report.percent(s["mfu"]), s["step_memory_gib"])
        for n, s in sides.items()
    ]
    header = ("", "ms/step", "tokens/s", "TFLOP/s", "MFU", "memory GiB")
    parts = [report.heading(result), report.table(header, rows)]
    if result["peak_tflops"] is not None:
        parts.append(f"MFU: {result['mfu_definition']}, {result['peak_tflops']} TFLOP/s.")
    else:
        parts.append("No MFU: the peak rate of this device or precision is not known.")
    for key, what in (("speedup", "time"), ("speedup_cpu_time", "CPU time")):
        if key in result:
            ratio = report.spread_text(result[key])
            parts.append(f"{what}, {result['baseline']} / ours: {ratio}; above 1: ours is faster")
    phases = [(name, *side["phases_ms"].values()) for name, side in sides.items()]
    parts.append(report.table(("ms by phase", *sides["ours"]["phases_ms"]), phases))
    if result["roofline"] is not None:
        parts.append(roofline.as_text(result["roofline"]))
    if result["by_r"]:
        keys = ("num_jacobi_iterations", "ms_per_step", "step_memory_gib")
        by_r = [[row[key] for key in keys] for row in result["by_r"]]
        parts.append(report.table(("R", "ms/step", "memory GiB"), by_r))
    return "\n\n".join(parts)


def draw(result: dict[str, Any], path: Path) -> None:
    """Memory and time of a step over R, as a PNG."""
    r = [row["num_jacobi_iterations"] for row in result["by_r"]]
    figure, panels = report.new_panels(2)
    for axes, key, label in (
        (panels[0], "step_memory_gib", "memory of a step (GiB)"),
        (panels[1], "ms_per_step", "time of a step (ms)"),
    ):
        axes.plot(r, [row[key] for row in result["by_r"]], marker="o", color="#d97706")
        axes.set(xlabel="Jacobi iterations R", ylabel=label, xticks=r)
        axes.set_ylim(bottom=0)
    save_png(figure, path)
