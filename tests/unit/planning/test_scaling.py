"""The search for layouts: what it accepts, what it takes, and how it tells time."""

import dataclasses
from typing import Any

import pytest

from megatron_ponder.config.parse import parse_args
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import ConfigError
from megatron_ponder.model.size import forward_flops
from megatron_ponder.planning.memory import stage_memory
from megatron_ponder.planning.options import ScalingOptions
from megatron_ponder.planning.run import GIB, PlannedRun
from megatron_ponder.planning.scaling import (
    SAME_TIME,
    accepted_layouts,
    find_layout,
    plan_scaling,
    predict,
)
from megatron_ponder.planning.scaling_time import GROUPS_SIMULATED, StepClock
from megatron_ponder.planning.timeline import simulate
from tests.unit.planning.scaling_document import PRESETS, scale, tables, written

pytestmark = pytest.mark.thorough

OPTIONS = ScalingOptions(world_sizes=(8,), largest_micro_batch_size=2)
FLAGS = (
    "--num-layers 4 --hidden-size 256 --ffn-hidden-size 704 --num-attention-heads 8 "
    "--seq-length 2048 --vocab-size 8000 --bf16 --global-batch-size 64 --num-jacobi-iterations 2"
).split()


def run_of(*flags: str) -> RunConfig:
    return parse_args([*FLAGS, *flags], prog="test")


def base_of(*flags: str) -> PlannedRun:
    return PlannedRun.resolved(run_of(*flags), world_size=1)


def laid_out(**changes: Any) -> PlannedRun:
    return PlannedRun.resolved(run_of().replaced(**changes), world_size=8)


def total_s(run: PlannedRun, options: ScalingOptions = OPTIONS) -> float:
    return StepClock(options, run).time_step().total_s


def test_only_computing_takes_flops_over_the_rate() -> None:
    run = base_of()
    flops = forward_flops(run.config.model, run.plan, 2048).training * 64
    time = StepClock(OPTIONS, run).time_step()
    assert time.compute_s == pytest.approx(flops / (OPTIONS.assumed_tflops * 1e12))
    assert time.total_s == time.compute_s


def test_later_microbatches_take_as_long_as_simulated_ones() -> None:
    """Extrapolated against whole simulations, with messages that are felt."""
    slow = dataclasses.replace(OPTIONS, network_gb_per_s=5.0, devices_per_node=2)
    for pipeline, chunks, method in (
        (2, 1, "ponderlm2"),
        (4, 1, "ponderlm2"),
        (2, 2, "vanilla"),
        (4, 1, "vanilla"),
    ):
        run = laid_out(
            pipeline_model_parallel_size=pipeline,
            num_virtual_stages_per_pipeline_rank=chunks,
            overlap_p2p_communication=True,
            method=method,
            global_batch_size=256,
        )
        clock = StepClock(slow, run)
        whole = simulate(run.pipeline(), clock.forward_s, clock.backward_s, clock.message_s)
        time = clock.time_step()
        busy_s = time.compute_s + time.recompute_s + time.tensor_s + time.context_s
        assert run.num_microbatches > GROUPS_SIMULATED * pipeline
        assert busy_s + time.bubble_s == pytest.approx(whole.makespan_s, rel=0.01)
        assert clock.bound_s <= whole.makespan_s * (1 + 1e-9)


def test_links() -> None:
    """NVLink inside a node; across nodes a ring's ranks in a node put their ports together."""
    clock = StepClock(dataclasses.replace(OPTIONS, link_efficiency=1.0), laid_out())
    assert clock.ring_rate(1, 8) == 450e9
    assert clock.ring_rate(8, 2) == 50e9
    assert clock.ring_rate(2, 8) == 4 * 50e9
    assert clock.ring_rate(1, 4096) == 8 * 50e9


def test_slower_links_and_latency_take_longer() -> None:
    for layout in (
        {"tensor_model_parallel_size": 8, "sequence_parallel": True},
        {"context_parallel_size": 4, "use_distributed_optimizer": True},
        {"pipeline_model_parallel_size": 2},
        {},
    ):
        run = laid_out(**layout)
        slower = dataclasses.replace(OPTIONS, nvlink_gb_per_s=1.0)
        later = dataclasses.replace(OPTIONS, message_latency_us=1000.0)
        assert total_s(run, slower) > 1.01 * total_s(run)
        assert total_s(run, later) > 1.001 * total_s(run)


def test_overlap_hides_gradients() -> None:
    replicas: dict[str, Any] = {"use_distributed_optimizer": True}
    hidden = replicas | {"overlap_grad_reduce": True, "overlap_param_gather": True}
    slower = dataclasses.replace(OPTIONS, nvlink_gb_per_s=0.1)
    open_s = StepClock(slower, laid_out(**replicas)).time_step().data_s
    clock = StepClock(slower, laid_out(**hidden))
    hidden_s = clock.time_step().data_s
    assert open_s - hidden_s == pytest.approx(clock.forward_s[0][0] + clock.backward_s[0][0])


@pytest.mark.parametrize("memory_gib", [72.0, 1.0, 0.3])
def test_takes_the_fastest_that_fits(memory_gib: float) -> None:
    """Against timing every layout: nothing that fits is faster by more than the tie."""
    options = dataclasses.replace(OPTIONS, device_memory_gib=memory_gib)
    base = base_of()
    layouts = list(accepted_layouts(options, base, 8))
    best, number = find_layout(options, base, 8)
    assert number == len(layouts) > 50
    fitting = []
    for run in layouts:
        if max(stage.total for stage in stage_memory(run)) <= memory_gib * GIB:
            fitting.append(run)
    assert best is not None and best in fitting and 0 < len(fitting) <= len(layouts)
    assert len(fitting) < len(layouts) or memory_gib == 72.0
    assert total_s(best, options) <= SAME_TIME * min(total_s(run, options) for run in fitting)


def test_nothing_fits() -> None:
    result = plan_scaling(dataclasses.replace(OPTIONS, device_memory_gib=0.01), run_of())
    (row,) = result["rows"]
    assert row["layout"] is None and row["num_accepted_layouts"] > 50


def test_fewer_sequences_than_devices_are_cut() -> None:
    """8 sequences on 64 devices: data parallelism ends at 8."""
    best, _ = find_layout(OPTIONS, base_of("--global-batch-size", "8"), 64)
    assert best is not None
    parallel = best.config.parallel
    cuts = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    assert cuts * parallel.context_parallel_size >= 8


def test_a_random_r_overlaps_only_where_it_is_exact() -> None:
    base = base_of("--random-jacobi-iterations")
    configs = [run.config for run in accepted_layouts(OPTIONS, base, 8)]
    assert any(config.parallel.overlap_grad_reduce for config in configs)
    for config in configs:
        is_cut = config.parallel.pipeline_model_parallel_size > 1
        if is_cut or config.training.recompute_granularity in ("pass", "full"):
            assert not config.parallel.overlap_grad_reduce


def test_prediction_adds_up() -> None:
    run = laid_out(
        tensor_model_parallel_size=2,
        sequence_parallel=True,
        pipeline_model_parallel_size=2,
        use_distributed_optimizer=True,
        recompute_granularity="pass",
    )
    ours = predict(OPTIONS, run)
    compared = predict(OPTIONS, run.changed(method="vanilla"))
    for one, num_passes in ((ours, 4), (compared, 1)):
        assert sum(one["time_s"].values()) == pytest.approx(one["step_s"])
        assert one["tokens_per_s"] == pytest.approx(64 * 2048 / one["step_s"])
        assert len(one["sent_bytes_per_pass"]) == num_passes
        by_pass = sum(sent["pipeline"] for sent in one["sent_bytes_per_pass"])
        # 32 micro-batches; each stage has passes that are its busiest.
        assert 32 * by_pass >= one["sent_bytes_per_step"]["pipeline"] > 0
    assert ours["sent_bytes_per_step"]["data"] == compared["sent_bytes_per_step"]["data"]
    # 1 + 3 x 2 slots of a token, of which passes that are computed again gather twice
    ratio = ours["sent_bytes_per_step"]["tensor"] / compared["sent_bytes_per_step"]["tensor"]
    assert 7 < ratio < 10
    assert ours["time_s"]["recompute_s"] > 0 == compared["time_s"]["recompute_s"]


@pytest.mark.slow
def test_the_document_is_current() -> None:
    """Else: python -m tests.unit.planning.scaling_document."""
    assert written() == tables({preset: scale(preset) for preset in PRESETS})


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="--global-batch-size"):
        plan_scaling(OPTIONS, run_of().replaced(global_batch_size=None))
    for wrong in (
        {"world_sizes": ()},
        {"world_sizes": (0,)},
        {"assumed_tflops": 0.0},
        {"link_efficiency": 1.5},
        {"message_latency_us": -1.0},
        {"devices_per_node": 0},
    ):
        with pytest.raises(ConfigError):
            ScalingOptions(**wrong)
