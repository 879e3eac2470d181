"""The training loop: iterate, report, evaluate, save, stop.

After each iteration, every rank runs in this order: counters, log line, evaluation, checkpoint,
stop. A run that resumes from its checkpoint does the same arithmetic as one that never stopped.

The results of iteration i are fetched after iteration i+1 has been launched, so the device never
idles, unless logging, evaluation or saving is due in between. A request to stop, or a loss that is
not finite, may therefore be noticed one iteration late. All ranks notice it after the same
iteration.
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
"""Consecutive iterations with a non-finite loss or gradient after which the run fails."""

MAX_STEPS_AHEAD = 1
"""Iterations that may be launched beyond the one whose results are fetched next."""

Batches = Callable[[], Iterator[Batch]]
"""Starts to read a dataset, and iterates over this rank's micro-batches."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingData:
    """The three datasets of a run."""

    train: Batches
    """Starts after the last sample that the run has consumed."""
    valid: Batches | None
    """Starts at the first sample; None if there is no validation."""
    test: Batches | None
    """Starts at the first sample; None if there is no test."""
    validation_sets: Mapping[str, Batches] = dataclasses.field(default_factory=dict)
    """Validation datasets that are reported by name, instead of `valid`."""


def train(
    config: ResolvedConfig,
    training_state: TrainingState,
    data: TrainingData,
    progress: Progress,
    reporter: Reporter,
    start_s: float,
) -> None:
    """Train until `train_iters`, or until a stop is requested.

    Args:
        config: resolved.
        training_state: changed in place.
        data: the datasets.
        progress: counters to resume from; changed in place.
        reporter: receives the results to report.
        start_s: `time.monotonic()` at the start of the run.

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
    num_launched: int,
    stop: StopRequest,
) -> Iterator[StepResult]:
    """Run the iterations, and yield their results in order.

    If logging, evaluation or saving is due after an iteration, no later iteration has been launched
    when its result is yielded: weights, counters and random states are those after it. The same
    holds for the last iteration.

    Args:
        config: resolved.
        training_state: changed in place.
        batches: this rank's micro-batches.
        num_launched: iterations that are already done.
        stop: this rank's stop request; after a request of any rank, no iteration is launched.
    """
    pending: collections.deque[PendingStep] = collections.deque()
    is_last = False
    while not is_last:
        num_launched += 1
        pending.append(
            train_step(
                config, training_state, batches, iteration=num_launched, wants_stop=stop.is_raised
            )
        )
        is_last = num_launched == config.training.train_iters or _is_due(
            num_launched, config.training.exit_interval
        )
        while pending and (
            len(pending) > MAX_STEPS_AHEAD or is_last or _blocks_next(config, num_launched)
        ):
            step = pending.popleft().fetch()
            is_last = is_last or step.is_stop_requested
            yield step


def _blocks_next(config: ResolvedConfig, iteration: int) -> bool:
    """Whether logging, evaluation or saving is due before the next iteration is launched."""
    intervals = (
        config.logging.log_interval,
        config.training.eval_interval,
        config.checkpoint.save_interval,
    )
    return any(_is_due(iteration, interval) for interval in intervals)


def _validate(
    config: ResolvedConfig, training_state: TrainingState, data: TrainingData, reporter: Reporter
) -> None:
    """Evaluate on every validation dataset."""
    if data.valid is not None:
        reporter.report_evaluation("valid", evaluate(config, training_state, data.valid()))
    for name, batches in data.validation_sets.items():
        reporter.report_evaluation(
            "valid", evaluate(config, training_state, batches()), dataset=name
        )


def _advance(progress: Progress, config: ResolvedConfig, step: StepResult) -> None:
    """Update the counters after an iteration."""
    progress.iteration += 1
    progress.consumed_samples += config.training.global_batch_size
    progress.consumed_tokens += step.num_tokens
    progress.skipped_iterations += not step.is_updated


def _is_due(iteration: int, interval: int | None) -> bool:
    """Whether an action with this interval is due after this iteration; 0 and None: never."""
    return interval is not None and interval > 0 and iteration % interval == 0


def _check_finite(progress: Progress, step: StepResult, num_skipped_in_a_row: int) -> None:
    """Warn about a skipped update, and fail after too many in a row."""
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
            f"{progress.iteration}; their updates were skipped. Resume from an earlier checkpoint "
            "with a lower --lr, a longer warm-up or a smaller --clip-grad."
        )


def _save(config: ResolvedConfig, training_state: TrainingState, progress: Progress) -> None:
    """Save a checkpoint, if the run has --save and has made an update."""
    if config.checkpoint.save is None:
        return
    if progress.updates == 0:
        logger.warning("no checkpoint is saved, because no update has been made yet")
        return
    save_checkpoint(
        config,
        chunks=training_state.model.chunks,
        optimizer=training_state.optimizer,
        scheduler=training_state.scheduler,
        progress=progress,
    )
