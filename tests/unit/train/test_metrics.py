"""The numbers of a log line: means over its window, rates per device."""

import math
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from megatron_ponder.checkpoint.progress import Progress
from megatron_ponder.model.size import forward_flops
from megatron_ponder.ponder.method import load_method
from megatron_ponder.ponder.training_plan import training_plan
from megatron_ponder.train import metrics
from megatron_ponder.train.metrics import Reporter, duration
from megatron_ponder.train.step import StepResult
from tests.unit.checkpoint.small_run import GLOBAL_BATCH_SIZE, SEQ_LENGTH, small_config

WORLD_SIZE = 4
TRAIN_ITERS = 100


def step(loss: float, **changes: Any) -> StepResult:
    values: dict[str, Any] = {
        "loss": loss,
        "num_tokens": 60,
        "grad_norm": 0.5,
        "learning_rate": 1e-3,
        "num_jacobi_iterations": 2,
        "is_updated": True,
        "is_stop_requested": False,
    }
    return StepResult(**{**values, **changes})


def report(*steps: tuple[StepResult, float], peak_tflops: float | None = None) -> dict[str, Any]:
    """The record of steps with their seconds, on WORLD_SIZE ranks."""
    written: list[dict[str, Any]] = []
    sink = mock.Mock(write=written.append)
    config = small_config(train_iters=TRAIN_ITERS)
    progress = Progress(iteration=len(steps), consumed_samples=40, consumed_tokens=600)
    with (
        mock.patch.object(metrics, "ranks", lambda: SimpleNamespace(world_size=WORLD_SIZE)),
        mock.patch.object(metrics, "peak_tflops", lambda bf16: peak_tflops),
    ):
        reporter = Reporter(config, load_method(config.method), progress, [sink])
    for each, seconds in steps:
        reporter.add(each, seconds)
    reporter.report_training(steps[-1][0])
    assert not progress.log_window
    return written[0]


def test_means_leave_skipped_iterations_out() -> None:
    skipped = step(math.nan, is_updated=False, num_jacobi_iterations=3)
    record = report((step(4.0), 1.0), (skipped, 1.0), (step(3.0), 1.0))
    assert record["lm_loss"] == 3.5
    assert record["num_jacobi_iterations"] == pytest.approx(7 / 3)
    assert math.isnan(report((skipped, 1.0))["lm_loss"])


def test_rates_are_per_second_and_per_device() -> None:
    record = report(
        (step(4.0, num_jacobi_iterations=1), 2.0),
        (step(3.0, num_jacobi_iterations=3, grad_norm=0.25, learning_rate=2e-3), 4.0),
        peak_tflops=1e-3,
    )
    config = small_config()
    method = load_method(config.method)
    flops = sum(
        forward_flops(config.model, training_plan(method, r), SEQ_LENGTH).training for r in (1, 3)
    )
    per_device = flops * GLOBAL_BATCH_SIZE / 6.0 / WORLD_SIZE
    assert record["tflops_per_device"] == pytest.approx(per_device / 1e12)
    assert record["mfu"] == pytest.approx(per_device / 1e9)
    assert record["tokens_per_s"] == 20.0
    assert record["elapsed_ms_per_iteration"] == 3000.0
    assert record["eta_s"] == (TRAIN_ITERS - 2) * 3.0
    assert record["num_jacobi_iterations"] == 2 and record["lm_loss"] == 3.5
    # Those of the last iteration.
    assert (record["grad_norm"], record["learning_rate"]) == (0.25, 2e-3)
    assert report((step(4.0), 1.0))["mfu"] is None


def test_durations() -> None:
    day_s = 24 * 3600
    found = [duration(s) for s in (0, 59.6, 3599, 3600, day_s - 1, day_s + 3661)]
    assert found == ["0:00:00", "0:01:00", "0:59:59", "1:00:00", "23:59:59", "1d 01:01:01"]
