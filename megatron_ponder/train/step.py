"""One training iteration: forward and backward of the global batch, then the update.

The loss is the mean over the unmasked tokens of the whole global batch, whatever the layout. The
iteration's R is drawn once, so that all micro-batches on all ranks run the same passes.

Nothing in an iteration waits for the device. Every iteration has two small reductions over ranks
(loss and stop request; gradient norm), and whether the weights move is decided on the device
(`optim.update`). The host starts an iteration and reads its numbers when it needs them, so that it
can have the next one under way before.
"""

import dataclasses
from collections.abc import Iterator

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_ponder.config.layout import microbatches_per_step
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.optim.adamw import learning_rate
from megatron_ponder.optim.update import clipped_update, gradient_norm
from megatron_ponder.parallel.parallel_model import ParallelModel
from megatron_ponder.parallel.schedule import Batch, all_reduce_totals, run_microbatches
from megatron_ponder.ponder.training_plan import jacobi_iterations, training_plan
from megatron_ponder.runtime.device import HostCopy
from megatron_ponder.runtime.distributed import ranks


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingState:
    """What is trained, and what trains it."""

    model: ParallelModel
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one iteration did; equal on all ranks."""

    loss: float
    """Mean over the tokens of the global batch, in nats."""
    num_tokens: int
    """Tokens that took part in the loss."""
    grad_norm: float
    """Euclidean norm of the gradient before clipping."""
    learning_rate: float
    """The rate of this update."""
    num_jacobi_iterations: int
    """R of this iteration."""
    is_updated: bool
    """Whether the weights moved; not where loss or gradient was not finite."""
    is_stop_requested: bool
    """Whether any rank asked to stop."""


class PendingStep:
    """An iteration that was started, and may still be running.

    Args:
        numbers: fp64 [5] on the device: sum of the loss, tokens, stop requests, gradient norm, and
            1 where the weights move.
        learning_rate: the rate of this update.
        num_jacobi_iterations: R of this iteration.
    """

    def __init__(self, numbers: Tensor, learning_rate: float, num_jacobi_iterations: int) -> None:
        self._numbers = HostCopy(numbers)
        self._learning_rate = learning_rate
        self._num_jacobi_iterations = num_jacobi_iterations

    def fetch(self) -> StepResult:
        """What it did; waits until that is known."""
        loss_sum, num_tokens, num_stop_requests, grad_norm, is_updated = self._numbers.fetch()
        return StepResult(
            loss=loss_sum / max(num_tokens, 1.0),
            num_tokens=int(num_tokens),
            grad_norm=grad_norm,
            learning_rate=self._learning_rate,
            num_jacobi_iterations=self._num_jacobi_iterations,
            is_updated=bool(is_updated),
            is_stop_requested=num_stop_requests > 0,
        )


def num_microbatches(config: ResolvedConfig) -> int:
    """Micro-batches that each data-parallel rank runs per iteration."""
    return microbatches_per_step(config, ranks().world_size)


def train_step(
    config: ResolvedConfig,
    training_state: TrainingState,
    batches: Iterator[Batch],
    *,
    iteration: int,
    wants_stop: bool,
) -> PendingStep:
    """Start one iteration, without waiting for any of it.

    The learning rate's schedule counts every iteration, also one whose update is skipped.

    Args:
        config: resolved.
        training_state: changed in place.
        batches: this rank's micro-batches, of which one iteration's are taken.
        iteration: the iteration's number, from 1.
        wants_stop: whether this rank asks all to stop after this iteration.
    """
    training_state.model.zero_grad_buffer()
    training_state.optimizer.zero_grad()
    r = jacobi_iterations(config.method, config.training.seed, iteration)
    loss_and_tokens = run_microbatches(
        training_state.model,
        batches,
        plan=training_plan(training_state.model.method, r),
        num_microbatches=num_microbatches(config),
        micro_batch_size=config.training.micro_batch_size,
        seq_length=config.data.seq_length,
        overlap_p2p_communication=config.parallel.overlap_p2p_communication,
    )
    wants_stop_here = loss_and_tokens.new_full((1,), float(wants_stop))
    status = all_reduce_totals(torch.cat((loss_and_tokens, wants_stop_here)))
    rate = learning_rate(training_state.optimizer)
    training_state.optimizer.prepare_grads()
    grad_norm = gradient_norm(training_state.optimizer)
    is_finite = torch.isfinite(status[0] + grad_norm)
    clipped_update(training_state.optimizer, grad_norm, is_finite)
    training_state.scheduler.step(increment=1)
    numbers = torch.cat((status, torch.stack((grad_norm, is_finite.double()))))
    return PendingStep(numbers, rate, r)
