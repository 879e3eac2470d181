"""One training iteration: forward and backward of the global batch, then the update.

The loss is the mean over the unmasked tokens of the global batch, for any layout. R is drawn once
per iteration, so all micro-batches on all ranks run the same passes.

An iteration has no device synchronisation. It has two small all-reduces over ranks (loss and stop
request; gradient norm). The device decides whether the update is applied (`optim.update`). The host
launches an iteration and fetches its results later, so it can launch the next one first.
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
    """Model, optimizer and LR scheduler."""

    model: ParallelModel
    optimizer: ChainedOptimizer
    scheduler: OptimizerParamScheduler


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepResult:
    """Result of one iteration; equal on all ranks."""

    loss: float
    """Mean over the unmasked tokens of the global batch, in nats."""
    num_tokens: int
    """Number of unmasked tokens."""
    grad_norm: float
    """Euclidean norm of the gradient before clipping."""
    learning_rate: float
    """Learning rate of this update."""
    num_jacobi_iterations: int
    """R of this iteration."""
    is_updated: bool
    """Whether the update was applied; false if the loss or the gradient was not finite."""
    is_stop_requested: bool
    """Whether any rank requested a stop."""


class PendingStep:
    """An iteration that has been launched and may still be running.

    Args:
        numbers: fp64 [5] on the device: sum of the loss, number of tokens, number of stop requests,
            gradient norm, and 1 if the update is applied.
        learning_rate: learning rate of this update.
        num_jacobi_iterations: R of this iteration.
    """

    def __init__(self, numbers: Tensor, learning_rate: float, num_jacobi_iterations: int) -> None:
        self._numbers = HostCopy(numbers)
        self._learning_rate = learning_rate
        self._num_jacobi_iterations = num_jacobi_iterations

    def fetch(self) -> StepResult:
        """Wait for the iteration to finish, and return its result."""
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
    """Launch one iteration, without a device synchronisation.

    The LR scheduler counts every iteration, including those whose update is skipped.

    Args:
        config: resolved.
        training_state: changed in place.
        batches: this rank's micro-batches; those of one iteration are consumed.
        iteration: number of the iteration, from 1.
        wants_stop: whether this rank requests that all ranks stop after this iteration.
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
