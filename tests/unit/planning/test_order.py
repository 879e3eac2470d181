"""The order of work on a stage is megatron-core's: its table, its counts, and what it does."""

import itertools

import pytest
from megatron.core.pipeline_parallel import schedules

from megatron_ponder.errors import ConfigError
from megatron_ponder.planning.order import Pipeline
from megatron_ponder.runtime import mcore_cpu
from tests.ranks import run_ranks
from tests.unit.planning.recorded_schedule import (
    Entry,
    communicator_for_counts,
    recorded_schedule,
)

SIZES = [
    (p, c, m)
    for p, c, groups in itertools.product((2, 3, 4, 8), (1, 2, 3, 5, 12), (1, 2, 3, 6))
    for m in (p * groups,)
]
RECORDED = [
    (p, c, m, overlap, forward_only)
    for p, c, m in [
        (2, 1, 2),
        (2, 1, 5),
        (4, 1, 3),
        (2, 2, 2),
        (2, 5, 4),
        (3, 4, 6),
        (4, 3, 4),
        (4, 8, 12),
    ]
    for overlap in (False, True)
    for forward_only in (False, True)
    if not (overlap and c == 1)
]


@pytest.mark.parametrize(("p", "c", "m"), SIZES)
def test_table_and_counts_are_megatron_cores(p: int, c: int, m: int) -> None:
    pipeline = Pipeline(num_pipeline_stages=p, num_chunks=c, num_microbatches=m)
    if c > 1:
        table = schedules.get_schedule_table(m, c, p)
        assert [(work.microbatch, work.chunk) for work in pipeline.forwards] == table
    for stage in range(p):
        counts = schedules.get_pp_rank_microbatches(
            m, c, p, p2p_communicator=communicator_for_counts(pipeline, stage)
        )
        total, _, num_warmup, num_remaining = counts
        assert pipeline.num_warmup(stage) == num_warmup
        order = pipeline.order(stage)
        assert len(order) == 2 * total
        first_backward = next(i for i, work in enumerate(order) if work.is_backward)
        assert first_backward == num_warmup + (num_remaining > 0)


def test_instructions_are_what_megatron_core_does() -> None:
    """In one process, with a stand-in for the communicator (recorded_schedule.py)."""
    pipelines = [
        Pipeline(
            num_pipeline_stages=p,
            num_chunks=c,
            num_microbatches=m,
            overlap=overlap,
            forward_only=forward_only,
        )
        for p, c, m, overlap, forward_only in RECORDED
    ]
    assert len(pipelines) > 20
    (recorded,) = run_ranks(_record, 1, pipelines)
    for pipeline, by_stage in zip(pipelines, recorded, strict=True):
        for stage, log in enumerate(by_stage):
            assert expected(pipeline, stage) == log, f"{pipeline}, stage {stage}"
        assert expected(pipeline, 0) != by_stage[1]


def _record(pipelines: list[Pipeline]) -> list[list[list[Entry]]]:
    """In a rank: megatron-core asks torch.distributed for sizes and ranks."""
    mcore_cpu.apply()
    return [
        [recorded_schedule(pipeline, stage) for stage in range(pipeline.num_pipeline_stages)]
        for pipeline in pipelines
    ]


def expected(pipeline: Pipeline, stage: int) -> list[Entry]:
    """The instructions in the form of `recorded_schedule`, without empty waits and sends."""
    log: list[Entry] = []
    needed = {
        pipeline.source(other, work)
        for other in range(pipeline.num_pipeline_stages)
        for work in pipeline.order(other)
    }
    for step in pipeline.instructions(stage):
        work = step.work
        if step.action == "compute":
            log.append(("compute", work.is_backward, work.chunk, work.microbatch))
        elif step.action == "send" and (stage, work) in needed:
            log.append(("send", work.is_backward))
        elif step.action == "wait" and pipeline.source(stage, work) is not None:
            log.append(("wait", work.is_backward))
    return log


def test_one_stage_runs_microbatches_one_after_the_other() -> None:
    pipeline = Pipeline(num_pipeline_stages=1, num_chunks=2, num_microbatches=2)
    order = [(w.microbatch, w.chunk, w.is_backward) for w in pipeline.order(0)]
    one = [(0, 0, False), (0, 1, False), (0, 1, True), (0, 0, True)]
    assert order == one + [(1, chunk, backward) for _, chunk, backward in one]


def test_microbatches_that_stages_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="need a multiple of 4"):
        Pipeline(num_pipeline_stages=4, num_chunks=3, num_microbatches=6)
    Pipeline(num_pipeline_stages=4, num_chunks=1, num_microbatches=6)
