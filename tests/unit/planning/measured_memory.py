"""What a training step really holds, in a rank of a test."""

from typing import Any

import torch

from benchmarks.step_memory import held_bytes, step_bytes
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.runtime.distributed import initialize
from megatron_ponder.train.run import build_training_state
from megatron_ponder.train.step import train_step


def measure(config: ResolvedConfig) -> dict[str, int]:
    """In a rank: bytes held between steps, and the most that a step adds to them.

    Args:
        config: resolved.
    """
    initialize(config.parallel, config.training.seed)
    training_state = build_training_state(config)
    batches = random_batches(config)

    def step() -> None:
        train_step(config, training_state, batches, iteration=1, wants_stop=False).fetch()

    step()  # allocates the optimizer's state
    added = step_bytes(step)
    return held_bytes(training_state) | {"step": added}


def random_batches(config: ResolvedConfig) -> Any:
    generator = torch.Generator().manual_seed(0)
    size = (config.training.micro_batch_size, config.data.seq_length)
    while True:
        tokens = torch.randint(config.model.vocab_size, size, generator=generator)
        yield {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(size)}
