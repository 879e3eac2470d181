"""One optimizer step of each side: ours, and on stock transformers layers.

All start from the same weights and take the same random tokens. Ours is the training step of a run.
The reference is written as one would write it: gradients summed over micro-batches, autocast if
the run is in bf16, fused AdamW, clipping. No side waits for its loss in a step.
"""

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from benchmarks.phases import Phase, named_phases, unnamed
from benchmarks.stock_reference import build_stock_reference
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.convert.weight_names import to_megatron
from megatron_ponder.parallel.schedule import Batch
from megatron_ponder.ponder.training_plan import jacobi_iterations
from megatron_ponder.runtime.device import device
from megatron_ponder.train.run import build_training_state
from megatron_ponder.train.step import train_step

Loss = Callable[[], float]
"""What waits for a step's loss, once it is wanted."""


class Steps(Protocol):
    """A side."""

    def step(self, iteration: int, phase: Phase = unnamed) -> Loss:
        """Start an optimizer step, and do not wait for it.

        Args:
            iteration: its number, from 1.
            phase: names the parts of the step.

        Returns:
            The loss before it.
        """


def build_steps(name: str, baseline: str, config: ResolvedConfig) -> Steps:
    """A side.

    Args:
        name: ours or reference.
        baseline: what ours is compared with: reference or none.
        config: resolved for one process.

    Raises:
        PonderError: the side does not have these settings.
    """
    if name == "ours":
        return OurSteps(config, baseline)
    return PlainSteps(config)


class OurSteps:
    """This package's training step, from the baseline's initial weights."""

    def __init__(self, config: ResolvedConfig, baseline: str = "none") -> None:
        self.config = config
        self.training_state = build_training_state(config)
        weights = {}
        if baseline == "reference":
            weights = build_stock_reference(config).stock_weights(config.model)
        if weights:
            state = to_megatron({k: w.detach() for k, w in weights.items()}, config.model)
            (model,) = self.training_state.model.modules
            model.load_state_dict(state, strict=False)
            self.training_state.optimizer.reload_model_params()
        self.batches = random_batches(config)

    def step(self, iteration: int, phase: Phase = unnamed) -> Loss:
        """See `Steps`."""
        with named_phases(self.training_state, phase):
            step = train_step(
                self.config,
                self.training_state,
                self.batches,
                iteration=iteration,
                wants_stop=False,
            )
        return lambda: step.fetch().loss


class PlainSteps:
    """The same without megatron-core."""

    def __init__(self, config: ResolvedConfig) -> None:
        self.config = config
        self.model = build_stock_reference(config).to(device()).train()
        self.optimizer = _fused_adamw(self.model, config)
        self.batches = random_batches(config)

    def step(self, iteration: int, phase: Phase = unnamed) -> Loss:
        """See `Steps`."""
        training = self.config.training
        num_microbatches = training.global_batch_size // training.micro_batch_size
        r = jacobi_iterations(self.config.method, training.seed, iteration)
        self.optimizer.zero_grad(set_to_none=True)
        loss_sum = torch.zeros((), device=device())
        for _ in range(num_microbatches):
            with phase("forward"):
                batch = next(self.batches)
                tokens, labels = (
                    batch[key].to(device(), non_blocking=True) for key in ("tokens", "labels")
                )
                with torch.autocast(device().type, torch.bfloat16, enabled=training.bf16):
                    loss = self.model(tokens, labels, r) / num_microbatches
            with phase("backward"):
                loss.backward()
            loss_sum += loss.detach()
        with phase("gradients"):
            clip = self.config.optimizer.clip_grad or math.inf
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        with phase("optimizer"):
            self.optimizer.step()
        return loss_sum.item


def _fused_adamw(model: nn.Module, config: ResolvedConfig) -> torch.optim.AdamW:
    """AdamW that decays what we decay."""
    optim = config.optimizer
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    return torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": optim.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=optim.lr,
        betas=(optim.adam_beta1, optim.adam_beta2),
        eps=optim.adam_eps,
        fused=True,
    )


def random_batches(config: ResolvedConfig) -> Iterator[Batch]:
    """Random tokens, the same for all sides."""
    generator = torch.Generator().manual_seed(config.training.seed)
    shape = (config.training.micro_batch_size, config.data.seq_length + 1)
    while True:
        ids: Tensor = torch.randint(config.model.vocab_size, shape, generator=generator)
        yield {
            "tokens": ids[:, :-1].contiguous(),
            "labels": ids[:, 1:].contiguous(),
            "loss_mask": torch.ones(shape[0], shape[1] - 1),
        }
