"""Training speed and memory, beside a baseline doing the same work in the same run.

The baseline is the method on stock transformers layers (`stock_reference`). Each side has its own
process; both take the same steps on the same random tokens from the same weights. On the CPU they
are timed in turns (ours, baseline, ours, ...), so that a slowdown of the machine hits both. A GPU
is steady and its memory limits the batch: there the sides run one after the other, each with the
whole device. The losses of the first steps must agree.

Phases, traces and passes are taken in steps of their own, behind the timed ones. With R values
given, our side is also measured once for each R, in a fresh process each, which shows what a step
costs as a function of R. Left out: more than one process per side, and data loading.
"""

import contextlib
import dataclasses
import datetime
import importlib.metadata
import math
import platform
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.options import TrainBenchmarkOptions
from benchmarks.process import Side, side
from megatron_ponder import log
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.config.schema import CheckpointConfig, RunConfig
from megatron_ponder.model.size import forward_flops
from megatron_ponder.ponder.method import load_method
from megatron_ponder.ponder.training_plan import training_plan
from megatron_ponder.runtime.device import device
from megatron_ponder.runtime.peak_flops import peak_tflops

LOSS_TOLERANCE = {False: 1e-4, True: 5e-2}
"""By bf16: between the first losses of the two sides; autocast rounds elsewhere than we do."""
MFU_DEFINITION = (
    "model FLOPs (matrix products of all passes, causal attention as half of the square, backward "
    "twice the forward, nothing recomputed) per second over the device's dense bf16 peak"
)
PHASE_STEPS = 3
"""Steps whose phases are timed; the fastest is told."""


def benchmark_training(options: TrainBenchmarkOptions, config: RunConfig) -> dict[str, Any]:
    """Measure a config.

    Args:
        options: how long, and what besides.
        config: as given; resolved here for one process.

    Returns:
        What is printed, by name: `ours`, the baseline under its name, `speedup` (its time over
        ours, above 1: ours is faster; the median over rounds, with the least and the largest),
        on the CPU `speedup_cpu_time` (the same in time that a core worked, which other processes
        on the machine disturb less), `roofline`, `by_r`, and what it ran on.

    Raises:
        PonderError: the settings cannot work, or the baseline does not have them.
    """
    config = dataclasses.replace(config, checkpoint=CheckpointConfig())
    config = resolve(config, world_size=1)
    baseline = options.baseline
    names = ["ours"] if baseline == "none" else ["ours", baseline]
    rounds = _measure(config, names, options)
    result: dict[str, Any] = environment(config)
    peak = peak_tflops(bf16=config.training.bf16)
    result |= {"baseline": baseline, "peak_tflops": peak, "mfu_definition": MFU_DEFINITION}
    for name in names:
        result[name] = _summary(config, rounds[name], options.steps)
    if baseline != "none":
        losses = [result[name]["first_loss"] for name in names]
        if not math.isclose(*losses, abs_tol=LOSS_TOLERANCE[config.training.bf16]):
            raise AssertionError(f"the two sides compute different things: losses {losses}")
        result["speedup"] = _speedup(rounds["ours"].ms, rounds[baseline].ms)
        if device().type == "cpu":
            cpu_ms = (rounds[name].cpu_ms for name in names)
            result["speedup_cpu_time"] = _speedup(*cpu_ms)
    result["roofline"] = rounds["ours"].roofline
    result["by_r"] = [_measure_r(config, r, options) for r in options.r_values]
    return result


@dataclasses.dataclass(kw_only=True)
class _Rounds:
    """One side's measurements."""

    first_loss: float = math.nan
    ms: list[float] = dataclasses.field(default_factory=list)
    """Milliseconds per step of each round."""
    cpu_ms: list[float] = dataclasses.field(default_factory=list)
    """The same in time that a core worked."""
    baseline_gib: float = 0.0
    """Held before the model was built: interpreter and libraries."""
    peak_gib: float = 0.0
    phases: dict[str, float] = dataclasses.field(default_factory=dict)
    roofline: dict[str, Any] | None = None


def _measure(
    config: ResolvedConfig, names: Sequence[str], options: TrainBenchmarkOptions
) -> dict[str, _Rounds]:
    """Time the sides: on the CPU alternately, on a GPU one after the other."""
    groups = [[name] for name in names] if device().type == "cuda" else [list(names)]
    rounds = {name: _Rounds() for name in names}
    with log.progress(len(names) * (options.rounds + 2), "benchmark", " rounds") as bar:
        for group in groups:
            with _sides(group, options.baseline, config) as sides:
                _time_rounds(sides, rounds, options, bar)
                for name, one in sides.items():
                    rounds[name].baseline_gib, rounds[name].peak_gib = one.ask("memory")
                    rounds[name].phases = one.ask("phases", PHASE_STEPS)
                    bar.update()
                if "ours" in sides and options.profile:
                    sides["ours"].ask("trace", options.profile)
                if "ours" in sides and options.roofline:
                    rounds["ours"].roofline = sides["ours"].ask("roofline")
    return rounds


@contextlib.contextmanager
def _sides(
    names: Sequence[str], baseline: str, config: ResolvedConfig
) -> Iterator[dict[str, Side]]:
    """Processes that run at the same time."""
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(side(name, baseline, config)) for name in names}


def _time_rounds(
    sides: dict[str, Side], rounds: dict[str, _Rounds], options: TrainBenchmarkOptions, bar: tqdm
) -> None:
    """Warm-up, then the rounds in turns."""
    for name, one in sides.items():
        losses, *_ = one.ask("take_steps", options.warmup_steps)
        rounds[name].first_loss = losses[0]
        bar.update()
    for _ in range(options.rounds):
        for name, one in sides.items():
            _, seconds, cpu_seconds = one.ask("take_steps", options.steps)
            rounds[name].ms.append(1e3 * seconds / options.steps)
            rounds[name].cpu_ms.append(1e3 * cpu_seconds / options.steps)
            bar.update()


def _measure_r(config: ResolvedConfig, r: int, options: TrainBenchmarkOptions) -> dict[str, Any]:
    """Our side at one R, in a process of its own."""
    config = config.replaced(num_jacobi_iterations=r, random_jacobi_iterations=False)
    options = dataclasses.replace(options, baseline="none", profile=None, roofline=False)
    (rounds,) = _measure(config, ["ours"], options).values()
    summary = _summary(config, rounds, options.steps)
    keys = ("ms_per_step", "peak_memory_gib", "step_memory_gib", "tflops")
    return {"num_jacobi_iterations": r} | {key: summary[key] for key in keys}


def _speedup(ours_ms: list[float], theirs_ms: list[float]) -> dict[str, float]:
    """The baseline's time over ours, round by round."""
    ratios = [theirs / ours for ours, theirs in zip(ours_ms, theirs_ms, strict=True)]
    return {"median": statistics.median(ratios), "least": min(ratios), "largest": max(ratios)}


def _summary(config: ResolvedConfig, rounds: _Rounds, steps_per_round: int) -> dict[str, Any]:
    """One side's figures; rates are of the median round."""
    training = config.training
    ms = statistics.median(rounds.ms)
    tokens = training.global_batch_size * config.data.seq_length
    plan = training_plan(load_method(config.method), config.method.num_jacobi_iterations)
    flops = forward_flops(config.model, plan, config.data.seq_length).training
    tflops, peak = None, peak_tflops(bf16=training.bf16)
    # Which R the timed steps drew is not one number: no rate is better than a wrong one.
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
        "step_memory_gib": rounds.peak_gib - rounds.baseline_gib,
        "first_loss": rounds.first_loss,
        "steps": steps_per_round * len(rounds.ms),
    }


def environment(config: ResolvedConfig) -> dict[str, Any]:
    """What the figures hold for."""
    is_cuda = device().type == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if is_cuda else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron_core": importlib.metadata.version("megatron-core"),
            "transformers": importlib.metadata.version("transformers"),
        },
        "config": config.to_flat_dict(),
    }
