"""When a run stops: by rank 0's clock, in minutes."""

from unittest import mock

import pytest

from megatron_ponder.config.schema import TrainingConfig
from megatron_ponder.train import stopping
from megatron_ponder.train.stopping import StopRequest

START_S = 1000.0


def is_raised(after_s: float, minutes: int | None) -> bool:
    stop = StopRequest(TrainingConfig(exit_duration_in_mins=minutes), START_S)
    with mock.patch.object(stopping.time, "monotonic", lambda: START_S + after_s):
        return stop.is_raised


def test_the_duration_is_in_minutes() -> None:
    assert not is_raised(119.9, 2) and is_raised(120.0, 2)
    assert not is_raised(1e9, None)


def test_only_rank_0_looks_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert not is_raised(121.0, 2)


def test_the_reason() -> None:
    stop = StopRequest(TrainingConfig(exit_duration_in_mins=1), START_S)
    with mock.patch.object(stopping.time, "monotonic", lambda: START_S + 59.0):
        assert stop.reason() == "a signal on another rank"
    with mock.patch.object(stopping.time, "monotonic", lambda: START_S + 61.0):
        assert stop.reason() == "--exit-duration-in-mins"
        stop._notice(15, None)
        assert stop.reason() == "signal SIGTERM"
