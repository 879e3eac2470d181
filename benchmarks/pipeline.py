"""The pipeline's schedule on paper beside a timed run of it on CPU ranks, one thread each.

Each rank notes when each of its forwards and backwards begins and ends, through the timers that
megatron-core's schedules offer. Their durations, and the time that a message takes between two
ranks, go into the simulator (planning/timeline.py); what it says about the step, waiting included,
is compared with what the step took. Twice:

    predicted   from the mean duration of each stage and chunk, as one would estimate a run
    replayed    from each computation's own duration: what is left then is not the machine's noise
                but what the simulator does not know

Each step is compared with its own durations, and the fastest step is the one reported: waiting for
a core that another process has looks like a bubble, and is none.

Left out: gradient reduction and the optimizer, which come after the schedule; data parallelism;
GPUs, where a host's clock says little about when something ran.
"""

import contextlib
import dataclasses
import multiprocessing
import os
import statistics
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.options import PipelineBenchmarkOptions
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import ConfigError
from megatron_ponder.planning.order import Pipeline, Work
from megatron_ponder.planning.picture import draw_timeline
from megatron_ponder.planning.run import PlannedRun
from megatron_ponder.planning.timeline import (
    Event,
    Timeline,
    equal_chunks_bubble,
    simulate,
    simulate_each,
)

DEFAULT_STAGES = 2
MICROBATCHES_PER_STAGE = 4
"""Of a run that does not say its global batch."""

Spans = list[tuple[float, float]]
"""Begin and end, in seconds of the machine's monotonic clock, of each computation of a step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Comparison:
    """One step, measured and predicted."""

    measured: Timeline
    predicted: Timeline
    replayed: Timeline


def benchmark_pipeline(
    options: PipelineBenchmarkOptions, config: RunConfig
) -> tuple[dict[str, Any], Timeline]:
    """Run the pipeline and its simulation.

    Args:
        options: how long.
        config: as given; the global batch and two stages are filled in where they are left out.

    Returns:
        The figures, and the measured timeline of the fastest step.

    Raises:
        ConfigError: the settings do not fit together or have no pipeline.
    """
    config = _resolved(config)
    from benchmarks.train import environment

    world_size = _world_size(config)
    pipeline = PlannedRun(config, world_size).pipeline()
    answers = _run_ranks(options, config, world_size)
    per_stage = world_size // pipeline.num_pipeline_stages
    latency_s = max(latency for latency, _ in answers)
    comparisons = [
        _compare(
            pipeline,
            [answers[s * per_stage][1][step] for s in range(pipeline.num_pipeline_stages)],
            latency_s,
        )
        for step in range(options.steps)
    ]
    result = environment(config) | _figures(comparisons, latency_s) | {"threads": 1}
    fastest = min(comparisons, key=lambda one: one.measured.makespan_s)
    return result, fastest.measured


def _resolved(config: RunConfig) -> ResolvedConfig:
    """The config with two stages, and four micro-batches for each, where nothing is said.

    Raises:
        ConfigError: a random R, or settings that do not fit together.
    """
    if config.method.random_jacobi_iterations:
        raise ConfigError("benchmark pipeline needs one R: --no-random-jacobi-iterations.")
    if config.parallel.pipeline_model_parallel_size == 1:
        config = config.replaced(pipeline_model_parallel_size=DEFAULT_STAGES)
    if config.training.global_batch_size is None:
        stages = config.parallel.pipeline_model_parallel_size
        num_microbatches = MICROBATCHES_PER_STAGE * stages
        config = config.replaced(
            global_batch_size=num_microbatches * config.training.micro_batch_size
        )
    config = config.replaced(distributed_backend="gloo")
    return resolve(config, world_size=_world_size(config))


def _world_size(config: RunConfig) -> int:
    """One replica."""
    parallel = config.parallel
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def _run_ranks(
    options: PipelineBenchmarkOptions, config: ResolvedConfig, world_size: int
) -> list[tuple[float, list[Spans]]]:
    """Start the ranks and gather what they measured, in order."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        connections = []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(
                target=_work,
                args=(options, config, rank, world_size, str(Path(folder, "store")), there),
                daemon=True,
            )
            process.start()
            there.close()
            stack.callback(process.kill)
            connections.append(here)
        answers = []
        for rank, connection in enumerate(connections):
            try:
                answers.append(connection.recv())
            except EOFError:
                raise ConfigError(
                    f"rank {rank} ended early (its message is above); if there is none, most "
                    "likely out of memory: give a smaller model or --micro-batch-size."
                ) from None
        return answers


def _work(
    options: PipelineBenchmarkOptions,
    config: ResolvedConfig,
    rank: int,
    world_size: int,
    store_path: str,
    connection: Connection,
) -> None:
    """Body of a rank: train, and send the latency and the spans of each timed step."""
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), CUDA_VISIBLE_DEVICES=""
    )
    from megatron_ponder import log

    log.configure()  # before the imports below, some of which warn
    import torch
    import torch.distributed as dist

    from benchmarks.spans import SpanTimers, message_latency_s
    from benchmarks.steps import random_batches
    from megatron_ponder.runtime.distributed import running
    from megatron_ponder.train.run import build_training_state
    from megatron_ponder.train.step import train_step

    torch.set_num_threads(1)
    store = dist.FileStore(store_path, world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    with running(config.parallel, config.training.seed):
        training_state = build_training_state(config)
        timers = SpanTimers()
        training_state.model.modules[0].config.timers = timers
        batches = random_batches(config)
        steps: list[Spans] = []
        for iteration in range(1, options.warmup_steps + options.steps + 1):
            train_step(
                config, training_state, batches, iteration=iteration, wants_stop=False
            ).fetch()
            steps.append(timers.take())
        latency_s = message_latency_s(config)
        connection.send((latency_s, steps[options.warmup_steps :]))


def _compare(pipeline: Pipeline, by_stage: list[Spans], latency_s: float) -> _Comparison:
    """A measured step, and the one that follows from its durations."""
    start_s = min(begin for spans in by_stage for begin, _ in spans)
    events = tuple(
        Event(stage=stage, work=work, start_s=begin - start_s, end_s=end - start_s)
        for stage, spans in enumerate(by_stage)
        for work, (begin, end) in zip(pipeline.order(stage), spans, strict=True)
    )
    own: dict[tuple[int, Work], float] = {}
    durations: dict[tuple[int, int, bool], list[float]] = {}
    for event in events:
        own[event.stage, event.work] = event.end_s - event.start_s
        key = (event.stage, event.work.chunk, event.work.is_backward)
        durations.setdefault(key, []).append(event.end_s - event.start_s)
    forward, backward = (
        [
            [
                statistics.fmean(durations[stage, chunk, is_backward])
                for chunk in range(pipeline.num_chunks)
            ]
            for stage in range(pipeline.num_pipeline_stages)
        ]
        for is_backward in (False, True)
    )
    return _Comparison(
        measured=Timeline(pipeline=pipeline, events=events),
        predicted=simulate(pipeline, forward, backward, latency_s),
        replayed=simulate_each(pipeline, lambda *key: own[key], latency_s),
    )


def _figures(comparisons: list[_Comparison], latency_s: float) -> dict[str, Any]:
    """Those of the fastest step, which other processes disturbed least; and every step's."""
    pipeline = comparisons[0].measured.pipeline
    steps = [
        {
            side: {"ms": 1e3 * timeline.makespan_s, "bubble": timeline.bubble}
            for side, timeline in vars(comparison).items()
        }
        for comparison in comparisons
    ]
    fastest = min(steps, key=lambda step: step["measured"]["ms"])
    ratios = {
        f"{side}_over_measured": {
            name: fastest[side][name] / fastest["measured"][name] for name in ("ms", "bubble")
        }
        for side in ("predicted", "replayed")
    }
    return {
        "num_pipeline_stages": pipeline.num_pipeline_stages,
        "num_chunks": pipeline.num_chunks,
        "num_microbatches": pipeline.num_microbatches,
        "latency_ms": 1e3 * latency_s,
        "bubble_if_chunks_were_equal": equal_chunks_bubble(
            pipeline.num_pipeline_stages, pipeline.num_microbatches, pipeline.num_chunks
        ),
        **fastest,
        **ratios,
        "steps": steps,
    }


def as_text(result: dict[str, Any]) -> str:
    """The figures of `benchmark_pipeline` for people."""
    lines = [
        f"{result['num_pipeline_stages']} stages, {result['num_chunks']} chunks, "
        f"{result['num_microbatches']} micro-batches, one thread per rank, {result['device']}, "
        f"torch {result['versions']['torch']}, "
        f"megatron-core {result['versions']['megatron_core']}, {result['date']}",
        f"a message takes {result['latency_ms']:.2f} ms",
        "",
        f"{'':>10} {'ms/step':>10} {'bubble':>8} {'time / measured':>16} {'bubble / measured':>18}",
    ]
    for side in ("measured", "predicted", "replayed"):
        row = f"{side:>10} {result[side]['ms']:>10.1f} {result[side]['bubble']:>8.1%}"
        if side != "measured":
            ratio = result[f"{side}_over_measured"]
            row += f" {ratio['ms']:>16.3f} {ratio['bubble']:>18.3f}"
        lines.append(row)
    return "\n".join(lines)


def draw_measured(measured: Timeline, result: dict[str, Any], path: Path) -> None:
    """The measured timeline as a PNG."""
    layer_chunks = result["config"]["num_virtual_stages_per_pipeline_rank"]
    draw_timeline(measured, path, title="measured on CPU ranks", num_layer_chunks=layer_chunks)
