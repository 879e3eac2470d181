"""One iteration: what makes it skip its update, and a batch that has nothing to learn from."""

import copy
import itertools
import math
from collections.abc import Iterator
from unittest import mock

import torch

from megatron_ponder.parallel.schedule import Batch
from megatron_ponder.train import step
from megatron_ponder.train.evaluation import evaluate
from megatron_ponder.train.step import StepResult, TrainingState, train_step
from tests.ranks import run_ranks
from tests.unit.checkpoint.small_run import build_training_state, iteration_batches, small_config

CONFIG = small_config(num_layers=1, eval_iters=1, weight_decay=0.0)


def _masked() -> Iterator[Batch]:
    """Micro-batches without any unmasked token."""
    for batch in iteration_batches(CONFIG, 1):
        yield {**batch, "loss_mask": torch.zeros_like(batch["loss_mask"])}


def _step(training_state: TrainingState, batches: Iterator[Batch]) -> tuple[StepResult, float]:
    """What an iteration did, and the most that a weight moved by."""
    before = copy.deepcopy([p.detach() for _, p in training_state.model.named_parameters()])
    arguments = {"iteration": 1, "wants_stop": False}
    result = train_step(CONFIG, training_state, batches, **arguments).fetch()
    moved = [
        (p.detach() - b).abs().max().item()
        for (_, p), b in zip(training_state.model.named_parameters(), before, strict=True)
    ]
    return result, max(moved)


def _poisoned() -> list[tuple[str, float, StepResult, float]]:
    """Iterations of which only the loss, or only the gradient, is not finite."""
    training_state = build_training_state(CONFIG)
    run_microbatches = step.run_microbatches
    found = []
    for where, poison in itertools.product(("loss", "gradient"), (math.nan, math.inf)):

        def run(*args, where=where, poison=poison, **kwargs) -> torch.Tensor:
            totals = run_microbatches(*args, **kwargs)
            _, parameter = next(training_state.model.named_parameters())
            poisoned = totals if where == "loss" else parameter.main_grad.view(-1)
            poisoned[0] = poison
            return totals

        with mock.patch.object(step, "run_microbatches", run):
            found.append((where, poison, *_step(training_state, iteration_batches(CONFIG, 1))))
    return found


def test_loss_and_gradient_must_both_be_finite() -> None:
    for where, poison, result, moved in run_ranks(_poisoned, 1)[0]:
        assert math.isfinite(result.loss) == (where != "loss"), (where, poison)
        assert math.isfinite(result.grad_norm) == (where != "gradient"), (where, poison)
        assert not result.is_updated and moved == 0.0, (where, poison)


def _without_tokens() -> tuple[StepResult, float, float, StepResult, float]:
    training_state = build_training_state(CONFIG)
    masked, moved = _step(training_state, _masked())
    evaluation = evaluate(CONFIG, training_state, _masked())
    following, moved_then = _step(training_state, iteration_batches(CONFIG, 2))
    return masked, moved, evaluation.loss, following, moved_then


def test_a_batch_without_any_unmasked_token() -> None:
    """Moves nothing and disturbs nothing: its gradient is 0, not 0 / 0."""
    masked, moved, evaluated, following, moved_then = run_ranks(_without_tokens, 1)[0]
    assert (masked.loss, masked.grad_norm, masked.num_tokens) == (0.0, 0.0, 0)
    assert moved == 0.0 and evaluated == 0.0
    assert following.is_updated and following.grad_norm > 0 and moved_then > 0
