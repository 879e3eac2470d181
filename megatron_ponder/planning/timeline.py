"""When each stage computes what: a simulation of one step of a pipeline, event by event.

Instructions come from order.py, durations from the caller. Each stage has one clock: a computation
takes its duration, a send takes no time, a wait lasts until the message has arrived. A message
travels for `latency_s` after it has been sent and, without overlapped communication, after its
receiver has begun to wait for it.

Closed form: if all chunks cost f forward and b backward, on p stages with m micro-batches (a
multiple of p) and c chunks,

    makespan = (m c + p - 1) (f + b),   bubble = (p - 1) / (m c + p - 1) of it.

This is exact at latency 0, with and without overlapped communication (tests compare). It is not
exact if chunks differ (growth passes are shorter, the last pass has the head), if stages differ
(the last has the head, an uneven split), or if messages take time: then stages wait for the
longest, and the simulation says how long.
"""

import dataclasses
from collections.abc import Callable, Sequence

from megatron_ponder.planning.order import Pipeline, Work

Table = Sequence[Sequence[float]]
"""Seconds by stage and chunk."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """One computation of a stage."""

    stage: int
    work: Work
    start_s: float
    end_s: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """One step of a pipeline."""

    pipeline: Pipeline
    events: tuple[Event, ...]
    """Stage by stage, each in its order."""

    @property
    def makespan_s(self) -> float:
        """From the first computation to the end of the last."""
        return max(event.end_s for event in self.events)

    @property
    def work_s(self) -> float:
        """Time that stages compute, summed over stages."""
        return sum(event.end_s - event.start_s for event in self.events)

    @property
    def bubble(self) -> float:
        """Share of the stages' time in which they wait."""
        available_s = self.pipeline.num_pipeline_stages * self.makespan_s
        return 1 - self.work_s / available_s if available_s else 0.0


def equal_chunks_bubble(num_pipeline_stages: int, num_microbatches: int, num_chunks: int) -> float:
    """The bubble if all chunks cost the same; the module says where that is exact."""
    return (num_pipeline_stages - 1) / (num_microbatches * num_chunks + num_pipeline_stages - 1)


def simulate(
    pipeline: Pipeline, forward_s: Table, backward_s: Table, latency_s: float = 0.0
) -> Timeline:
    """Simulate one step.

    Args:
        pipeline: the order.
        forward_s: seconds of a forward, [stage][chunk].
        backward_s: seconds of a backward with its recompute, [stage][chunk].
        latency_s: from sending to arrival at another stage.
    """
    for table in (forward_s, backward_s):
        assert len(table) == pipeline.num_pipeline_stages
        assert all(len(row) == pipeline.num_chunks for row in table)

    def duration_s(stage: int, work: Work) -> float:
        if not work.is_backward:
            return forward_s[stage][work.chunk]
        return backward_s[stage][work.chunk] if work.chunk >= pipeline.first_grad_chunk else 0.0

    return simulate_each(pipeline, duration_s, latency_s)


def simulate_each(
    pipeline: Pipeline, duration_s: Callable[[int, Work], float], latency_s: float = 0.0
) -> Timeline:
    """Simulate one step, with a duration for every single computation.

    Args:
        pipeline: the order.
        duration_s: seconds, by stage and work.
        latency_s: from sending to arrival at another stage.
    """
    num_pipeline_stages = pipeline.num_pipeline_stages
    programs = [pipeline.instructions(stage) for stage in range(num_pipeline_stages)]
    positions, clocks = [0] * num_pipeline_stages, [0.0] * num_pipeline_stages
    asked_s: list[float | None] = [None] * num_pipeline_stages  # when a stage began to wait
    sent_s: dict[tuple[int, Work], float] = {}
    events: list[list[Event]] = [[] for _ in programs]
    latency_s = latency_s if num_pipeline_stages > 1 else 0.0
    is_moving = True
    while is_moving:
        is_moving = False
        for stage, program in enumerate(programs):
            while positions[stage] < len(program):
                step = program[positions[stage]]
                if step.action == "wait":
                    source = pipeline.source(stage, step.work)
                    asked_s[stage] = clocks[stage] if asked_s[stage] is None else asked_s[stage]
                    if source is not None and source not in sent_s:
                        break
                    if source is not None:
                        asked = 0.0 if pipeline.overlap else asked_s[stage] or 0.0
                        arrived_s = max(asked, sent_s[source]) + latency_s
                        clocks[stage] = max(clocks[stage], arrived_s)
                elif step.action == "send":
                    sent_s[stage, step.work] = clocks[stage]
                else:
                    asked_s[stage] = None
                    start_s = clocks[stage]
                    clocks[stage] += duration_s(stage, step.work)
                    events[stage].append(
                        Event(stage=stage, work=step.work, start_s=start_s, end_s=clocks[stage])
                    )
                positions[stage] += 1
                is_moving = True
    stuck = [s for s, program in enumerate(programs) if positions[s] < len(program)]
    assert not stuck, f"stages {stuck} wait for each other: {pipeline}"
    return Timeline(pipeline=pipeline, events=tuple(e for mine in events for e in mine))
