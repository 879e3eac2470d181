"""The simulated step: closed form where it is exact, by hand where it is not."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ponder.planning.order import Pipeline, Work
from megatron_ponder.planning.timeline import Timeline, equal_chunks_bubble, simulate

EXACT = [
    (p, c, p * groups, overlap)
    for p, c, groups in itertools.product((1, 2, 3, 4, 6), (1, 2, 5, 9), (1, 3))
    for overlap in (False, True)
]


def uniform(pipeline: Pipeline, forward_s: float, backward_s: float, **more: float) -> Timeline:
    rows = range(pipeline.num_pipeline_stages)
    return simulate(
        pipeline,
        [[forward_s] * pipeline.num_chunks for _ in rows],
        [[backward_s] * pipeline.num_chunks for _ in rows],
        **more,
    )


@pytest.mark.parametrize("backward_s", [1.0, 2.0, 3.5])
def test_equal_chunks_follow_the_closed_form(backward_s: float) -> None:
    for p, c, m, overlap in EXACT:
        pipeline = Pipeline(
            num_pipeline_stages=p, num_chunks=c, num_microbatches=m, overlap=overlap
        )
        timeline = uniform(pipeline, 1.0, backward_s)
        assert timeline.makespan_s == pytest.approx((m * c + p - 1) * (1 + backward_s)), pipeline
        assert timeline.bubble == pytest.approx(equal_chunks_bubble(p, m, c)), pipeline


def test_two_stages_by_hand() -> None:
    """One pass, two micro-batches; the second stage is slower.

    stage 0: F0 0-1, F1 1-2,          B0 6-8,          B1 11-13
    stage 1:         F0 1-3, B0 3-6,  F1 6-8, B1 8-11
    """
    pipeline = Pipeline(num_pipeline_stages=2, num_chunks=1, num_microbatches=2)
    timeline = simulate(pipeline, [[1.0], [2.0]], [[2.0], [3.0]])
    spans = {
        (e.stage, e.work.microbatch, e.work.is_backward): (e.start_s, e.end_s)
        for e in timeline.events
    }
    assert spans[0, 0, True] == (6, 8) and spans[0, 1, True] == (11, 13)
    assert spans[1, 1, False] == (6, 8) and spans[1, 1, True] == (8, 11)
    assert timeline.makespan_s == 13
    assert timeline.bubble == pytest.approx(1 - 16 / 26)


def test_a_message_travels_once_it_is_asked_for() -> None:
    """The second activation is sent at 2, but the second stage asks for it at 4.5 only."""
    pipeline = Pipeline(num_pipeline_stages=2, num_chunks=1, num_microbatches=2)
    timeline = uniform(pipeline, 1.0, 2.0, latency_s=0.5)
    second_stage = [(e.start_s, e.end_s) for e in timeline.events if e.stage == 1]
    assert second_stage == [(1.5, 2.5), (2.5, 4.5), (5.0, 6.0), (6.0, 8.0)]
    assert timeline.makespan_s == 8 + 0.5 + 2


def test_latency_delays_and_overlap_hides_it() -> None:
    def makespan_s(overlap: bool, latency_s: float) -> float:
        pipeline = Pipeline(
            num_pipeline_stages=2, num_chunks=4, num_microbatches=8, overlap=overlap
        )
        return uniform(pipeline, 1.0, 2.0, latency_s=latency_s).makespan_s

    assert makespan_s(False, 0.0) == makespan_s(True, 0.0) == (8 * 4 + 1) * 3
    assert makespan_s(False, 0.5) > makespan_s(True, 0.5) > makespan_s(True, 0.0)


def test_unequal_chunks_wait_for_the_longest() -> None:
    """The closed form is a lower bound then."""
    costs = [0.5, 1.0, 1.0, 1.3]
    pipeline = Pipeline(num_pipeline_stages=4, num_chunks=4, num_microbatches=8)
    timeline = simulate(pipeline, [costs] * 4, [[2 * c for c in costs]] * 4)
    assert timeline.bubble > equal_chunks_bubble(4, 8, 4)


def test_chunks_without_gradient_cost_no_backward() -> None:
    pipeline = Pipeline(num_pipeline_stages=2, num_chunks=4, num_microbatches=4, first_grad_chunk=3)
    timeline = uniform(pipeline, 1.0, 2.0)
    assert timeline.work_s == pytest.approx(2 * 4 * (4 * 1.0 + 1 * 2.0))
    whole = uniform(Pipeline(num_pipeline_stages=2, num_chunks=4, num_microbatches=4), 1.0, 2.0)
    assert timeline.makespan_s < whole.makespan_s


def test_evaluation_has_forwards_only() -> None:
    pipeline = Pipeline(num_pipeline_stages=3, num_chunks=2, num_microbatches=6, forward_only=True)
    timeline = uniform(pipeline, 1.0, 2.0)
    assert timeline.makespan_s == 6 * 2 + 2
    assert not any(event.work.is_backward for event in timeline.events)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_nothing_starts_before_what_it_needs(data: st.DataObject) -> None:
    """Any costs: dependencies hold, stages do one thing at a time, and nobody waits for ever."""
    p, c = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    pipeline = Pipeline(
        num_pipeline_stages=p,
        num_chunks=c,
        num_microbatches=p * data.draw(st.integers(1, 3)),
        first_grad_chunk=data.draw(st.integers(0, c - 1)),
        overlap=data.draw(st.booleans()),
    )
    row = st.lists(st.floats(0, 5), min_size=c, max_size=c)
    table = st.lists(row, min_size=p, max_size=p)
    timeline = simulate(pipeline, data.draw(table), data.draw(table), latency_s=0.25)
    ends: dict[tuple[int, Work], float] = {(e.stage, e.work): e.end_s for e in timeline.events}
    assert len(ends) == 2 * p * c * pipeline.num_microbatches
    latency_s = 0.25 if p > 1 else 0.0
    clocks = [0.0] * p
    for event in timeline.events:
        assert event.start_s >= clocks[event.stage]
        clocks[event.stage] = event.end_s
        source = pipeline.source(event.stage, event.work)
        if source is not None:
            assert event.start_s >= ends[source] + latency_s
