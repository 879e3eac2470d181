"""The simulated schedule beside a timed step on two CPU ranks, one thread each.

Each rank notes when each of its forwards and backwards begins and ends, through the timers that
megatron-core's schedules call. The mean duration of each stage and chunk, and the time that a
message takes, go into the simulator; its step time and bubble are compared with those of the step.
"""

import os
import statistics
import time

import pytest
import torch
import torch.distributed as dist

from megatron_ponder.config.parse import parse_args
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.planning.order import Pipeline
from megatron_ponder.planning.run import PlannedRun
from megatron_ponder.planning.timeline import Event, Timeline, simulate
from megatron_ponder.runtime.distributed import initialize, process_groups
from megatron_ponder.train.run import build_training_state
from megatron_ponder.train.step import train_step
from tests.ranks import run_ranks
from tests.unit.planning.measured_memory import random_batches

STAGES, STEPS, ROUND_TRIPS = 2, 60, 30
RUN = (
    "--num-layers 4 --hidden-size 128 --ffn-hidden-size 352 --num-attention-heads 4 "
    "--vocab-size 512 --seq-length 128 --num-jacobi-iterations 2 --micro-batch-size 4 "
    f"--global-batch-size 32 --pipeline-model-parallel-size {STAGES}"
).split()
TIMEOUT_S, QUIET_TIMEOUT_S = 900, 300

Spans = list[tuple[float, float]]
"""Begin and end of each computation of a step, in seconds of the machine's monotonic clock."""


class SpanTimers:
    """What megatron-core's config takes as `timers`: notes the spans of forwards and backwards."""

    def __init__(self) -> None:
        self.spans: Spans = []
        self.begin_s = 0.0

    def __call__(self, name: str, log_level: int | None = None) -> "Timer":
        return Timer(self, name)


class Timer:
    """One named timer; computations of a rank do not overlap."""

    def __init__(self, timers: SpanTimers, name: str) -> None:
        self.timers, self.name = timers, name
        self.is_computation = name in ("forward-compute", "backward-compute")

    def start(self, barrier: bool = False) -> None:
        if self.name == "forward-backward":
            dist.barrier()  # all ranks begin a step together
        if self.is_computation:
            self.timers.begin_s = time.perf_counter()

    def stop(self, barrier: bool = False) -> None:
        if self.is_computation:
            self.timers.spans.append((self.timers.begin_s, time.perf_counter()))


def timed_steps(config: ResolvedConfig, num_steps: int) -> tuple[float, list[Spans]]:
    """In a rank: seconds that a message takes, and the spans of each step but the first."""
    torch.set_num_threads(1)
    initialize(config.parallel, config.training.seed)
    training_state = build_training_state(config)
    training_state.model.modules[0].config.timers = timers = SpanTimers()
    batches, steps = random_batches(config), []
    for iteration in range(1, num_steps + 2):
        timers.spans = []
        train_step(config, training_state, batches, iteration=iteration, wants_stop=False).fetch()
        steps.append(timers.spans)
    latency_s = message_latency_s(config)
    return latency_s, steps[1:]


def message_latency_s(config: ResolvedConfig) -> float:
    """Median time of one hidden state between the two stages."""
    slots = config.data.seq_length * (config.method.num_latent_thoughts + 1)
    message = torch.zeros(slots, config.training.micro_batch_size, config.model.hidden_size)
    group = process_groups().pp
    other = dist.get_global_rank(group, 1 - group.rank())
    first, second = (dist.send, dist.recv) if group.rank() == 0 else (dist.recv, dist.send)
    times = []
    dist.barrier()
    for _ in range(ROUND_TRIPS):
        begin_s = time.perf_counter()
        first(message, other, group)
        second(message, other, group)
        times.append((time.perf_counter() - begin_s) / 2)
    return statistics.median(times)


def measured_timeline(pipeline: Pipeline, by_stage: list[Spans]) -> Timeline:
    """A step as it was."""
    start_s = min(begin for spans in by_stage for begin, _ in spans)
    return Timeline(
        pipeline=pipeline,
        events=tuple(
            Event(stage=stage, work=work, start_s=begin - start_s, end_s=end - start_s)
            for stage, spans in enumerate(by_stage)
            for work, (begin, end) in zip(pipeline.order(stage), spans, strict=True)
        ),
    )


def predicted_timeline(measured: Timeline, latency_s: float) -> Timeline:
    """What the simulator says, from the mean duration of each stage and chunk."""
    pipeline = measured.pipeline
    durations: dict[tuple[int, int, bool], list[float]] = {}
    for event in measured.events:
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
    return simulate(pipeline, forward, backward, latency_s)


def compare(num_steps: int, *flags: str) -> tuple[Timeline, Timeline]:
    """The fastest measured step, which other processes disturbed least, and its prediction."""
    config = resolve(parse_args([*RUN, *flags], prog="test"), world_size=STAGES)
    pipeline = PlannedRun(config, STAGES).pipeline()
    answers = run_ranks(timed_steps, STAGES, config, num_steps, timeout_s=TIMEOUT_S)
    latency_s = max(latency for latency, _ in answers)
    steps = [
        measured_timeline(pipeline, list(by_stage))
        for by_stage in zip(*(spans for _, spans in answers), strict=True)
    ]
    fastest = min(steps, key=lambda step: step.makespan_s)
    return fastest, predicted_timeline(fastest, latency_s)


def test_a_step_is_timed_and_predicted() -> None:
    """The measurement itself, on a tiny model; how close it is, the slow test asks."""
    tiny = "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --seq-length 16".split()
    measured, predicted = compare(1, *tiny, "--global-batch-size", "8")
    pipeline = measured.pipeline
    assert (pipeline.num_pipeline_stages, pipeline.num_chunks, pipeline.num_microbatches) == (
        2,
        4,
        2,
    )
    assert len(measured.events) == len(predicted.events) == 2 * 2 * 4 * 2
    for timeline in (measured, predicted):
        assert timeline.makespan_s > 0 and 0 < timeline.bubble < 1


@pytest.mark.slow
def test_prediction_is_within_15_percent_of_a_timed_step() -> None:
    """Step time and bubble.

    Wants two cores to itself, so it waits for other processes to be gone; the fastest of 60 steps
    counts, as others may be disturbed. Seen: bubble 0.98 alone, down to 0.8 at a load of 10.
    """
    deadline = time.monotonic() + QUIET_TIMEOUT_S
    while os.getloadavg()[0] > (os.cpu_count() or 2) and time.monotonic() < deadline:
        time.sleep(5)
    measured, predicted = compare(STEPS)
    assert predicted.makespan_s == pytest.approx(measured.makespan_s, rel=0.15)
    assert predicted.bubble == pytest.approx(measured.bubble, rel=0.15)
