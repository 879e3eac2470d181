"""Points of cost curves, what is predicted for them, and the arithmetic of ratios."""

import dataclasses
from typing import Any, get_args

import pytest

from benchmarks.commands import CurvesOptions, Variable
from benchmarks.curve_points import (
    SMALL_BASE,
    Point,
    Prediction,
    curve_points,
    predict,
    with_defaults,
)
from benchmarks.curves import TITLES, Measured, describe_point
from benchmarks.processes import processes
from benchmarks.steps import build_ours, drop, measure_memory, take_steps
from megatron_ponder.config.parse import parse_args
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import ConfigError
from megatron_ponder.model.size import forward_flops
from megatron_ponder.planning.run import PlannedRun

OPTIONS = CurvesOptions()


def base_of(*flags: str) -> RunConfig:
    return with_defaults(OPTIONS, parse_args(flags, prog="test"))


def points_of(variable: Variable, **changes: Any) -> dict[float | str, Point]:
    options = dataclasses.replace(OPTIONS, **changes)
    return {point.value: point for point in curve_points(variable, options, base_of())}


@pytest.mark.parametrize("variable", get_args(Variable))
def test_every_curve_passes_through_the_base(variable: Variable) -> None:
    base = resolve(base_of(), world_size=1)
    points = points_of(variable)
    assert sum(point.run == (base, 1) for point in points.values()) == 1
    assert len({point.run for point in points.values()}) == len(points) >= 2
    assert variable in TITLES


def test_points_change_what_they_say() -> None:
    wide = points_of("width")[512.0].config.model
    base = resolve(base_of(), world_size=1).model
    assert (wide.hidden_size, wide.num_attention_heads, wide.ffn_hidden_size) == (512, 16, 1408)
    assert wide.kv_channels == base.kv_channels and wide.num_layers == base.num_layers
    batch = points_of("micro-batch")[8.0].config.training
    assert (batch.micro_batch_size, batch.global_batch_size) == (8, 16)
    pause = points_of("method")["pause K=3"].config
    assert pause.method.num_latent_thoughts == 3
    replicas, stages = points_of("data-parallel")[2.0], points_of("pipeline")[2.0]
    assert (replicas.world_size, stages.world_size) == (2, 2)
    assert stages.config.parallel.pipeline_model_parallel_size == 2


def test_predictions() -> None:
    """By FLOPs: exactly those of model/size.py, shared by ranks that are no pipeline."""
    base = predict(resolve(base_of(), world_size=1), 1)
    for variable in ("jacobi-iterations", "seq-length", "method"):
        for point in points_of(variable).values():
            config, found = point.config, predict(*point.run)
            flops = forward_flops(config.model, PlannedRun(*point.run).plan, config.data.seq_length)
            assert found.flops == 4 * flops.training
            assert found.seconds / base.seconds == pytest.approx(found.flops / base.flops)
    double = predict(*points_of("micro-batch")[4.0].run)
    assert double.seconds == pytest.approx(2 * base.seconds)
    assert base.memory_bytes < double.memory_bytes < 2 * base.memory_bytes
    replicas = predict(*points_of("data-parallel")[2.0].run)
    assert replicas.seconds == pytest.approx(base.seconds / 2)
    stages = predict(*points_of("pipeline")[2.0].run)
    assert base.seconds / 2 < stages.seconds < base.seconds
    assert stages.flops == replicas.flops == base.flops


def test_ratios_are_of_rounds() -> None:
    point = points_of("micro-batch")[4.0]
    base = Prediction(flops=1.0, seconds=predict(*point.run).seconds / 4, memory_bytes=100)
    measured = Measured(ms=[10.0, 60.0, 8.0], base_ms=[5.0, 10.0, 8.0], memory_bytes=300)
    found = describe_point(point, base, measured, base_memory_bytes=200)
    assert found["time"].pop("quartiles") == [1.5, 4.0]
    assert found["time"] == pytest.approx(
        {"median": 2.0, "least": 1.0, "largest": 6.0, "of_fastest": 1.6, "predicted": 4.0}
    )
    assert found["memory"]["measured"] == 1.5 and found["ms_per_step"] == 10.0


def test_a_small_base_fills_in_what_is_not_said() -> None:
    assert base_of("--num-jacobi-iterations", "1").method.num_jacobi_iterations == 1
    assert base_of().model.num_layers == SMALL_BASE["num_layers"]
    given = base_of("--preset", "pythia-14m")
    assert given.model.num_layers == 6 and given.data.seq_length == 2048
    assert given.training.global_batch_size == 2


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="no-random-jacobi-iterations"):
        base_of("--random-jacobi-iterations")
    with pytest.raises(ConfigError, match="--variables pipeline, 3"):
        points_of("pipeline", ranks=(3,))
    for wrong in ({"rounds": 0}, {"factors": (0.0,)}, {"k_values": (-1,)}, {"variables": ()}):
        with pytest.raises(ConfigError):
            CurvesOptions(**wrong)


def fail(held: dict[str, Any]) -> None:
    raise ConfigError("as asked")


def test_a_process_measures_what_the_planner_says() -> None:
    """Two models in one process in turns; its errors arrive here."""
    small = {"num_layers": 1, "hidden_size": 32, "ffn_hidden_size": 96, "seq_length": 32}
    base = base_of().replaced(**small)
    runs = {r: resolve(base.replaced(num_jacobi_iterations=r), world_size=1) for r in (0, 2)}
    with processes("a rank", num_threads=1) as group:
        for r, config in runs.items():
            group.run(build_ours, str(r), config)
        for r, config in runs.items():
            ((losses, seconds, _),) = group.run(take_steps, str(r), 1, 2)
            assert len(losses) == 2 and seconds > 0
            (memory,) = group.run(measure_memory, str(r))
            assert memory == pytest.approx(predict(config, 1).memory_bytes, rel=0.1)
        group.run(drop, "0")
        with pytest.raises(ConfigError, match="as asked"):
            group.run(fail)
        with pytest.raises(ConfigError, match="ended early"):
            group.run(take_steps, "0", 1, 1)
