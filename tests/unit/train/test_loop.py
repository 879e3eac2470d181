"""The loop reads numbers late: in which order, what a stop and a divergence then find."""

import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from megatron_ponder.checkpoint.progress import Progress
from megatron_ponder.checkpoint.reader import load_checkpoint, locate
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import TrainingError
from megatron_ponder.parallel.schedule import Batch
from megatron_ponder.runtime import distributed
from megatron_ponder.train import loop
from megatron_ponder.train.metrics import Reporter
from megatron_ponder.train.sinks import Record
from megatron_ponder.train.step import PendingStep, Trainee
from megatron_ponder.train.stopping import StopRequest
from tests.ranks import run_ranks
from tests.unit.checkpoint.small_run import build_trainee, iteration_batches, parts, small_config

NEVER = {"log_interval": 1000, "eval_interval": 0}


class _Events:
    """What the loop does, in order, and at which iteration each rank wants to stop."""

    def __init__(self, wants_stop_at: int | None = None) -> None:
        self.seen: list[str] = []
        self._num_started = self._num_read = 0
        self._wants_stop_at = wants_stop_at

    def start(self, *args, wants_stop: bool, iteration: int, **kwargs) -> PendingStep:
        self._num_started += 1
        assert iteration == self._num_started
        self.seen.append(f"start {iteration}")
        wants_stop = self._wants_stop_at is not None and iteration >= self._wants_stop_at
        return _train_step(*args, iteration=iteration, wants_stop=wants_stop, **kwargs)

    def read(self, step: PendingStep):
        self._num_read += 1
        self.seen.append(f"read {self._num_read}")
        return _read(step)

    def write(self, record: Record) -> None:
        self.seen.append(f"report {record['iteration']}")

    def close(self) -> None:
        pass


_train_step, _read = loop.train_step, PendingStep.read


def _endless(config: RunConfig, poisoned: range) -> Iterator[Batch]:
    """Micro-batches of all iterations; the loss of poisoned ones overflows."""
    for iteration in range(1, 1000):
        for batch in iteration_batches(config, iteration):
            if iteration in poisoned:
                batch["loss_mask"][0, 0] = 3e38
            yield batch


def _train(
    config: RunConfig, events: _Events, poisoned: range = range(0)
) -> tuple[Trainee, Progress]:
    """A run, watched."""
    trainee, progress = build_trainee(config), Progress()
    reporter = Reporter(config, trainee.model.method, progress, [events])
    data = loop.TrainingData(train=lambda: _endless(config, poisoned), valid=None, test=None)
    with (
        mock.patch.object(loop, "train_step", events.start),
        mock.patch.object(PendingStep, "read", lambda step: events.read(step)),
    ):
        loop.train(config, trainee, data, progress, reporter, time.monotonic())
    return trainee, progress


def _order(settings: dict) -> list[str]:
    events = _Events()
    _train(small_config(1, **NEVER | settings), events)
    distributed.leave_layout()
    return events.seen


def test_the_next_iteration_is_started_before_one_is_read() -> None:
    expected = "start 1, start 2, read 1, start 3, read 2, start 4, read 3, read 4"
    assert ", ".join(run_ranks(_order, 1, {"train_iters": 4})[0]) == expected


def test_what_is_due_sees_its_own_iteration() -> None:
    """Lines after 2 and 4, of numbers that are there, with nothing started behind them."""
    expected = (
        "start 1, start 2, read 1, read 2, report 2, start 3, start 4, read 3, read 4, report 4, "
        "start 5, read 5"
    )
    found = run_ranks(_order, 1, {"train_iters": 5, "log_interval": 2})[0]
    assert ", ".join(found) == expected


def test_exit_interval_starts_nothing_more() -> None:
    found = run_ranks(_order, 1, {"train_iters": 9, "exit_interval": 3})[0]
    assert found[-3:] == ["start 3", "read 2", "read 3"]


def _stop(folder: str, layout: dict) -> tuple[list[str], int, dict[str, torch.Tensor]]:
    """Rank 1 alone wants to stop, at iteration 3."""
    config = small_config(2, **NEVER | layout, train_iters=100, save=folder)
    events = _Events(3 if dist.get_rank() == 1 else None)
    trainee, progress = _train(config, events)
    weights = {name: p.detach().clone() for name, p in trainee.model.named_parameters()}
    distributed.leave_layout()
    return events.seen, progress.iteration, weights


def _stored(folder: str, layout: dict) -> tuple[Progress, dict[str, torch.Tensor]]:
    config = small_config(2, **NEVER | layout, train_iters=100, load=folder)
    trainee = build_trainee(config)
    progress = load_checkpoint(config, locate(Path(folder), None), **parts(trainee))
    weights = {name: p.detach().clone() for name, p in trainee.model.named_parameters()}
    distributed.leave_layout()
    return progress, weights


def test_one_rank_stops_all_after_the_same_iteration(tmp_path: Path) -> None:
    """Which is one later than it asked, and the one that is saved."""
    layout = {"use_distributed_optimizer": True}
    stopped = run_ranks(_stop, 2, str(tmp_path), layout)
    stored = run_ranks(_stored, 2, str(tmp_path), layout)
    for (seen, iteration, weights), (progress, saved) in zip(stopped, stored, strict=True):
        assert seen[-3:] == ["start 4", "read 3", "read 4"]
        assert iteration == progress.iteration == 4
        assert all(torch.equal(weights[name], saved[name]) for name in weights)


def _diverge(poisoned: range, train_iters: int) -> tuple[str, Progress, list[str]]:
    events = _Events()
    config = small_config(1, **NEVER, train_iters=train_iters)
    message, progress = "", Progress()
    try:
        _, progress = _train(config, events, poisoned)
    except TrainingError as error:
        message = str(error)
    distributed.leave_layout()
    return message, progress, events.seen


def test_skipped_iterations_are_counted() -> None:
    message, progress, _ = run_ranks(_diverge, 1, range(3, 5), 7)[0]
    assert not message
    assert (progress.iteration, progress.skipped_iterations, progress.updates) == (7, 2, 5)


def test_a_run_gives_up_at_the_tenth_skipped_iteration_in_a_row() -> None:
    message, _, seen = run_ranks(_diverge, 1, range(3, 100), 50)[0]
    assert "not finite in the last 10 iterations, up to 12" in message
    assert seen[-2:] == ["start 13", "read 12"]


def test_a_stop_stays_wanted() -> None:
    """What the loop relies on: the iteration that is under way when a stop is read has it too."""
    with StopRequest(small_config().training, time.monotonic()) as stop:
        assert not stop.is_raised
        stop._notice(15, None)
        assert stop.is_raised and stop.is_raised
