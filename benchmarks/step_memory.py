"""What a training step really holds, to the byte.

On CPU every allocation and release that torch's profiler sees is summed in order; on CUDA the
allocator's own peak is read. Left out: what is not torch's (interpreter, libraries), rounding and
fragmentation of the allocator.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_ponder.train.step import TrainingState


def held_bytes(training_state: TrainingState) -> dict[str, int]:
    """Bytes of this rank between steps: parameters, gradients, optimizer.

    Args:
        training_state: has taken a step, in which Adam's moments appear.
    """
    chunks = training_state.model.chunks
    buffers = [buffer for chunk in chunks for buffer in chunk.buffers]
    return {
        "parameters": sum(p.nbytes for chunk in chunks for p in chunk.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": _optimizer_bytes(training_state.optimizer),
    }


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


def step_bytes(step: Callable[[], object]) -> int:
    """The most that a step adds to what was held before it.

    Args:
        step: takes one; not the first, which creates the optimizer's state.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in profiler.profiler.kineto_results.events()
        if event.name() == "[memory]"
    )
    held = most = 0
    for _, nbytes in changes:
        held += nbytes
        most = max(most, held)
    return most
