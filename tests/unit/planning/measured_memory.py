"""What a training step really holds: every allocation and release that torch's profiler sees."""

from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_ponder.config.schema import RunConfig
from megatron_ponder.runtime.distributed import initialize, leave_layout
from megatron_ponder.train.run import build_trainee
from megatron_ponder.train.step import train_step


def measure(config: RunConfig) -> dict[str, int]:
    """In a rank: bytes held between steps, and the most that a step adds to them.

    Args:
        config: resolved.
    """
    initialize(config.parallel, config.training.seed)
    try:
        trainee = build_trainee(config)
        batches = random_batches(config)
        for iteration in (1, 2):  # the optimizer's state appears in the first
            train_step(config, trainee, batches, iteration=iteration, wants_stop=False)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            train_step(config, trainee, batches, iteration=3, wants_stop=False)
        changes = sorted(
            (event.start_ns(), event.nbytes())
            for event in profiler.profiler.kineto_results.events()
            if event.name() == "[memory]"
        )
        held = most = 0
        for _, nbytes in changes:
            held += nbytes
            most = max(most, held)
        buffers = [buffer for chunk in trainee.model.chunks for buffer in chunk.buffers]
        return {
            "parameters": sum(p.nbytes for c in trainee.model.chunks for p in c.parameters()),
            "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
            "optimizer": _optimizer_bytes(trainee.optimizer),
            "step": most,
        }
    finally:
        leave_layout()


def _optimizer_bytes(optimizer: Any) -> int:
    """Adam's moments, and fp32 copies of bf16 weights."""
    total = 0
    for chained in optimizer.chained_optimizers:
        groups = chained.optimizer.param_groups
        states = chained.optimizer.state
        for parameter in (p for group in groups for p in group["params"]):
            total += sum(v.nbytes for v in states[parameter].values() if v.dim() > 0)
            if chained.config.bf16:
                total += parameter.nbytes
    return total


def random_batches(config: RunConfig) -> Any:
    generator = torch.Generator().manual_seed(0)
    size = (config.training.micro_batch_size, config.data.seq_length)
    while True:
        tokens = torch.randint(config.model.vocab_size, size, generator=generator)
        yield {"tokens": tokens, "labels": tokens, "loss_mask": torch.ones(size)}
