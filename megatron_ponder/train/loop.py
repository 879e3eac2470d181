"""The training loop: iterate, report, evaluate, save, stop.

What happens after an iteration happens in this order on every rank: counters, log line, evaluation,
checkpoint, stop. A run that stops after a checkpoint and goes on from it does the same arithmetic
as one that never stopped.

Numbers of an iteration are read when the next one is under way, so that the device does not run
dry, except where something is to happen between the two. So a request to stop, or a loss that is
not finite, may be noticed one iteration late; all ranks notice it after the same one.
"""

import collections
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping

from megatron_ponder.checkpoint.progress import Progress
from megatron_ponder.checkpoint.writer import save_checkpoint
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.errors import TrainingError
from megatron_ponder.parallel.schedule import Batch
from megatron_ponder.train.evaluation import evaluate
from megatron_ponder.train.metrics import Reporter
from megatron_ponder.train.step import PendingStep, StepResult, TrainingState, train_step
from megatron_ponder.train.stopping import StopRequest

logger = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 10
"""A run whose loss or gradient was not finite this often in a row is not going to recover."""

MAX_STEPS_AHEAD = 1
"""Iterations that are started before the numbers of one are read."""

Batches = Callable[[], Iterator[Batch]]
"""Starts reading a dataset, on this rank."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The three datasets of a run."""

    train: Batches
    """From the sample that the run has come to."""
    valid: Batches | None
    """From the first sample; None where there are none."""
    test: Batches | None
    """As valid."""
    validation_sets: Mapping[str, Batches] = dataclasses.field(default_factory=dict)
    """Validation datasets that are reported by name, in the place of `valid`."""


def train(
    config: ResolvedConfig,
    training_state: TrainingState,
    data: TrainingData,
    progress: Progress,
    reporter: Reporter,
    start_s: float,
) -> None:
    """Train until `train_iters`, or until the run is to stop.

    Args:
        config: resolved.
        training_state: changed in place.
        data: what to read.
        progress: where to go on; changed in place.
        reporter: takes what there is to report.
        start_s: `time.monotonic()` when the run began.

    Raises:
        TrainingError: the loss or the gradient stays non-finite.
    """
    training = config.training
    saved_at = evaluated_at = None
    num_skipped_in_a_row = 0
    with StopRequest(training, start_s) as stop:
        since_s = time.monotonic()
        for step in _run_steps(config, training_state, data.train(), progress.iteration, stop):
            _advance(progress, config, step)
            reporter.add(step, time.monotonic() - since_s)
            num_skipped_in_a_row = 0 if step.is_updated else num_skipped_in_a_row + 1
            _check_finite(progress, step, num_skipped_in_a_row)
            if _is_due(progress.iteration, config.logging.log_interval):
                reporter.report_training(step)
            if _is_due(progress.iteration, training.eval_interval):
                _validate(config, training_state, data, reporter)
                evaluated_at = progress.iteration
            if _is_due(progress.iteration, config.checkpoint.save_interval):
                _save(config, training_state, progress)
                saved_at = progress.iteration
            since_s = time.monotonic()
        if step.is_stop_requested or _is_due(progress.iteration, training.exit_interval):
            if saved_at != progress.iteration:
                _save(config, training_state, progress)
            reason = stop.reason() if step.is_stop_requested else "--exit-interval"
            logger.info("stopped after iteration %d: %s", progress.iteration, reason)
            return
    if evaluated_at != progress.iteration:
        _validate(config, training_state, data, reporter)
    if data.test is not None:
        reporter.report_evaluation("test", evaluate(config, training_state, data.test()))
    if saved_at != progress.iteration:
        _save(config, training_state, progress)
    logger.info("training is done: %d iterations", progress.iteration)


def _run_steps(
    config: ResolvedConfig,
    training_state: TrainingState,
    batches: Iterator[Batch],
    num_done: int,
    stop: StopRequest,
) -> Iterator[StepResult]:
    """What the iterations of this run did, in order.

    Where something is due after an iteration, nothing later has been started when it is handed out:
    weights, counters and random states are those after it. That also holds for the last one.

    Args:
        config: resolved.
        training_state: changed in place.
        batches: this rank's micro-batches.
        num_done: iterations before.
        stop: this rank's wish; once any rank has it, no further iteration is started.
    """
    started: collections.deque[PendingStep] = collections.deque()
    is_last = False
    while not is_last:
        num_done += 1
        started.append(
            train_step(
                config, training_state, batches, iteration=num_done, wants_stop=stop.is_raised
            )
        )
        is_last = num_done == config.training.train_iters or _is_due(
            num_done, config.training.exit_interval
        )
        while started and (
            len(started) > MAX_STEPS_AHEAD or is_last or _is_awaited(config, num_done)
        ):
            step = started.popleft().fetch()
            is_last = is_last or step.is_stop_requested
            yield step


def _is_awaited(config: ResolvedConfig, iteration: int) -> bool:
    """Whether something needs to be done after an iteration before the next one starts."""
    intervals = (
        config.logging.log_interval,
        config.training.eval_interval,
        config.checkpoint.save_interval,
    )
    return any(_is_due(iteration, interval) for interval in intervals)


def _validate(
    config: ResolvedConfig, training_state: TrainingState, data: TrainingData, reporter: Reporter
) -> None:
    """Evaluate on what there is to validate on."""
    if data.valid is not None:
        reporter.report_evaluation("valid", evaluate(config, training_state, data.valid()))
    for name, batches in data.validation_sets.items():
        reporter.report_evaluation(
            "valid", evaluate(config, training_state, batches()), dataset=name
        )


def _advance(progress: Progress, config: ResolvedConfig, step: StepResult) -> None:
    """Count an iteration."""
    progress.iteration += 1
    progress.consumed_samples += config.training.global_batch_size
    progress.consumed_tokens += step.num_tokens
    progress.skipped_iterations += not step.is_updated


def _is_due(iteration: int, interval: int | None) -> bool:
    """Whether what happens every `interval` iterations happens after this; 0 and None: never."""
    return interval is not None and interval > 0 and iteration % interval == 0


def _check_finite(progress: Progress, step: StepResult, num_skipped_in_a_row: int) -> None:
    """Say that an update was left out, and give up where that goes on."""
    if step.is_updated:
        return
    logger.warning(
        "iteration %d: loss %s, gradient norm %s; the update is skipped",
        progress.iteration,
        step.loss,
        step.grad_norm,
    )
    if num_skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise TrainingError(
            f"loss or gradient was not finite in the last {num_skipped_in_a_row} iterations, up to "
            f"{progress.iteration}; their updates were skipped. Go on from an earlier checkpoint "
            "with a lower --lr, a longer warm-up or a smaller --clip-grad."
        )


def _save(config: ResolvedConfig, training_state: TrainingState, progress: Progress) -> None:
    """Save, where the run saves and has something to save."""
    if config.checkpoint.save is None:
        return
    if progress.updates == 0:
        logger.warning("nothing to save: no update was made yet")
        return
    save_checkpoint(
        config,
        chunks=training_state.model.chunks,
        optimizer=training_state.optimizer,
        scheduler=training_state.scheduler,
        progress=progress,
    )
