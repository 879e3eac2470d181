"""Loss on held-out data: forward only, R = num_jacobi_iterations, always the same samples."""

import dataclasses
import math
from collections.abc import Iterator

import torch

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.parallel.schedule import Batch, all_reduce_totals, run_microbatches
from megatron_ponder.runtime.device import device
from megatron_ponder.train.step import TrainingState, num_microbatches


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Result of an evaluation."""

    loss: float
    """Mean loss over unmasked tokens, in nats."""
    num_tokens: int
    """Number of unmasked tokens."""
    num_jacobi_iterations: int
    """R of the forward passes."""

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity if the loss is 700 or more, NaN if it is NaN."""
        return math.inf if self.loss >= 700 else math.exp(self.loss)


@torch.no_grad()
def evaluate(
    config: ResolvedConfig, training_state: TrainingState, batches: Iterator[Batch]
) -> Evaluation:
    """Compute the loss over `eval_iters` global batches.

    Args:
        config: resolved.
        training_state: not changed.
        batches: this rank's micro-batches, from the first sample on.
    """
    training_state.model.train(False)
    r = config.method.num_jacobi_iterations
    per_iteration = num_microbatches(config)
    total = torch.zeros(2, dtype=torch.float64, device=device())
    for _ in range(config.training.eval_iters):
        total += run_microbatches(
            training_state.model,
            batches,
            plan=training_state.model.method.plan(r),
            num_microbatches=per_iteration,
            micro_batch_size=config.training.micro_batch_size,
            seq_length=config.data.seq_length,
            forward_only=True,
            overlap_p2p_communication=config.parallel.overlap_p2p_communication,
        )
    training_state.model.train()
    loss_sum, num_tokens = all_reduce_totals(total).tolist()
    return Evaluation(
        loss=loss_sum / max(num_tokens, 1.0), num_tokens=int(num_tokens), num_jacobi_iterations=r
    )
