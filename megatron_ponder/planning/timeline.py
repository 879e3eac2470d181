"""When each stage does what: a simulation of one step on a pipeline, event by event.

Instructions come from order.py, durations from whoever measured or estimated them. Each stage has
one clock: a computation takes its time, a send takes none (buffers are assumed), a wait lasts until
the result has been sent and, `latency_s` later, has arrived.

Closed form: if all chunks cost f forward and b backward, on p stages with m micro-batches (a
multiple of p) and c chunks,

    makespan = (m c + p - 1) (f + b),   bubble = (p - 1) / (m c + p - 1) of it.

This is exact at latency 0, with and without overlapped communication (tests compare). It is not
where chunks differ (growth passes are shorter, the last pass has the head), where stages differ
(the last has the head, an uneven split), or where tensors take time to travel: then stages wait
for the longest, and the simulation says how long.
"""

import dataclasses
from collections.abc import Sequence

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
        available_s = self.pipeline.num_stages * self.makespan_s
        return 1 - self.work_s / available_s if available_s else 0.0


def equal_chunks_bubble(num_stages: int, num_microbatches: int, num_chunks: int) -> float:
    """The bubble if all chunks cost the same; the module says where that is exact."""
    return (num_stages - 1) / (num_microbatches * num_chunks + num_stages - 1)


def simulate(
    pipeline: Pipeline, forward_s: Table, backward_s: Table, latency_s: float = 0.0
) -> Timeline:
    """Run one step on paper.

    Args:
        pipeline: what is run in which order.
        forward_s: seconds of a forward, [stage][chunk].
        backward_s: seconds of a backward, [stage][chunk], what is recomputed included.
        latency_s: from sending to arrival at another stage.
    """
    num_stages = pipeline.num_stages
    for table in (forward_s, backward_s):
        assert len(table) == num_stages
        assert all(len(row) == pipeline.num_chunks for row in table)
    programs = [pipeline.instructions(stage) for stage in range(num_stages)]
    positions, clocks = [0] * num_stages, [0.0] * num_stages
    sent_s: dict[tuple[int, Work], float] = {}
    events: list[list[Event]] = [[] for _ in programs]
    latency_s = latency_s if num_stages > 1 else 0.0
    is_moving = True
    while is_moving:
        is_moving = False
        for stage, program in enumerate(programs):
            while positions[stage] < len(program):
                step = program[positions[stage]]
                if step.action == "wait":
                    source = pipeline.source(stage, step.work)
                    if source is not None and source not in sent_s:
                        break
                    if source is not None:
                        clocks[stage] = max(clocks[stage], sent_s[source] + latency_s)
                elif step.action == "send":
                    sent_s[stage, step.work] = clocks[stage]
                else:
                    start_s = clocks[stage]
                    clocks[stage] += _duration_s(
                        pipeline, step.work, forward_s[stage], backward_s[stage]
                    )
                    events[stage].append(
                        Event(stage=stage, work=step.work, start_s=start_s, end_s=clocks[stage])
                    )
                positions[stage] += 1
                is_moving = True
    stuck = [s for s, program in enumerate(programs) if positions[s] < len(program)]
    assert not stuck, f"stages {stuck} wait for each other: {pipeline}"
    return Timeline(pipeline=pipeline, events=tuple(e for mine in events for e in mine))


def _duration_s(
    pipeline: Pipeline, work: Work, forward_s: Sequence[float], backward_s: Sequence[float]
) -> float:
    """Seconds of one computation."""
    if not work.is_backward:
        return forward_s[work.chunk]
    return backward_s[work.chunk] if work.chunk >= pipeline.first_grad_chunk else 0.0
