"""The loop reads numbers late: in which order, what a stop and a divergence then find."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from megatron_ponder.checkpoint.progress import Progress
from megatron_ponder.checkpoint.reader import load_checkpoint, locate
from megatron_ponder.checkpoint.writer import save_checkpoint
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import TrainingError
from megatron_ponder.optim.adamw import learning_rate
from megatron_ponder.parallel.schedule import Batch
from megatron_ponder.train import loop
from megatron_ponder.train.metrics import Reporter
from megatron_ponder.train.sinks import Record
from megatron_ponder.train.step import PendingStep, TrainingState
from megatron_ponder.train.stopping import StopRequest
from tests.ranks import run_ranks
from tests.unit.checkpoint.small_run import (
    build_training_state,
    iteration_batches,
    parts,
    small_config,
)

NEVER = {"log_interval": 1000, "eval_interval": 0}


class _Events:
    """What the loop does, in order, and at which iteration each rank wants to stop."""

    def __init__(self, wants_stop_at: int | None = None) -> None:
        self.seen: list[str] = []
        self._not_read: list[int] = []
        self._wants_stop_at = wants_stop_at

    def start(self, *args, wants_stop: bool, iteration: int, **kwargs) -> PendingStep:
        self._not_read.append(iteration)
        self.seen.append(f"start {iteration}")
        wants_stop = self._wants_stop_at is not None and iteration >= self._wants_stop_at
        return _train_step(*args, iteration=iteration, wants_stop=wants_stop, **kwargs)

    def read(self, step: PendingStep):
        self.seen.append(f"read {self._not_read.pop(0)}")
        return _read(step)

    def write(self, record: Record) -> None:
        self.seen.append(f"report {record['iteration']}")

    def close(self) -> None:
        pass


_train_step, _read = loop.train_step, PendingStep.fetch


def _endless(config: RunConfig, first: int, poisoned: range) -> Iterator[Batch]:
    """Micro-batches of iterations from `first`; the loss of poisoned ones overflows."""
    for iteration in range(first, 1000):
        for batch in iteration_batches(config, iteration):
            if iteration in poisoned:
                batch["loss_mask"][0, 0] = 3e38
            yield batch


def _train(
    config: RunConfig, events: _Events, poisoned: range = range(0)
) -> tuple[TrainingState, Progress]:
    """A run, watched; it goes on from a checkpoint of its --load, if that is given."""
    training_state, progress = build_training_state(config), Progress()
    if config.checkpoint.load is not None:
        checkpoint = locate(Path(config.checkpoint.load), None)
        progress = load_checkpoint(config, checkpoint, **parts(training_state))
    reporter = Reporter(config, training_state.model.method, progress, [events])
    batches = _endless(config, progress.iteration + 1, poisoned)
    data = loop.TrainingData(train=lambda: batches, valid=None, test=None)
    with (
        mock.patch.object(loop, "train_step", events.start),
        mock.patch.object(PendingStep, "fetch", lambda step: events.read(step)),
    ):
        loop.train(config, training_state, data, progress, reporter, time.monotonic())
    return training_state, progress


def _order(settings: dict) -> list[str]:
    events = _Events()
    _train(small_config(1, **NEVER | settings), events)
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
    training_state, progress = _train(config, events)
    weights = {name: p.detach().clone() for name, p in training_state.model.named_parameters()}
    return events.seen, progress.iteration, weights


def _stored(folder: str, layout: dict) -> tuple[Progress, dict[str, torch.Tensor]]:
    config = small_config(2, **NEVER | layout, train_iters=100, load=folder)
    training_state = build_training_state(config)
    progress = load_checkpoint(config, locate(Path(folder), None), **parts(training_state))
    weights = {name: p.detach().clone() for name, p in training_state.model.named_parameters()}
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


def _signal_while_saving(folder: str) -> int:
    def save_under_fire(*args, **kwargs) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save_checkpoint(*args, **kwargs)

    config = small_config(1, **NEVER, train_iters=9, exit_interval=2, save=folder)
    with mock.patch.object(loop, "save_checkpoint", save_under_fire):
        _, progress = _train(config, _Events())
    return progress.iteration


def test_a_signal_does_not_disturb_the_last_save(tmp_path: Path) -> None:
    """torchrun sends a second one to ranks that are stopping already."""
    assert run_ranks(_signal_while_saving, 1, str(tmp_path)) == [2]
    assert locate(tmp_path, None).name == "iter_0000002"


def _diverge(poisoned: range, train_iters: int) -> tuple[str, Progress, list[str]]:
    events = _Events()
    config = small_config(1, **NEVER, train_iters=train_iters)
    message, progress = "", Progress()
    try:
        _, progress = _train(config, events, poisoned)
    except TrainingError as error:
        message = str(error)
    return message, progress, events.seen


def test_skipped_iterations_are_counted() -> None:
    message, progress, _ = run_ranks(_diverge, 1, range(3, 5), 7)[0]
    assert not message
    assert (progress.iteration, progress.skipped_iterations, progress.updates) == (7, 2, 5)


def _end(**settings: object) -> dict[str, torch.Tensor]:
    """Weights, moments and the next learning rate after a run of which some iterations overflow."""
    training_state, _ = _train(small_config(1, **NEVER | settings), _Events(), poisoned=range(3, 5))
    tensors = {name: p.detach().clone() for name, p in training_state.model.named_parameters()}
    states = training_state.optimizer.chained_optimizers[0].optimizer.state.values()
    for number, state in enumerate(states):
        tensors |= {f"{name} {number}": value.clone() for name, value in state.items()}
    tensors["rate"] = torch.tensor(learning_rate(training_state.optimizer))
    return tensors


def _end_resumed(folder: str) -> dict[str, torch.Tensor]:
    settings = {"train_iters": 8, "lr_decay_style": "cosine", "save": folder}
    _end(**settings, exit_interval=6)
    return _end(**settings, load=folder)


def _end_in_one() -> dict[str, torch.Tensor]:
    return _end(train_iters=8, lr_decay_style="cosine")


def test_resume_after_skipped_iterations_is_exact(tmp_path: Path) -> None:
    """The learning rate counts all of them, Adam only those that moved the weights."""
    whole = run_ranks(_end_in_one, 1)[0]
    parted = run_ranks(_end_resumed, 1, str(tmp_path))[0]
    assert whole["step 0"] == 6
    assert whole.keys() == parted.keys() and len(whole) > 40
    for name, tensor in whole.items():
        assert torch.equal(parted[name], tensor), name


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
