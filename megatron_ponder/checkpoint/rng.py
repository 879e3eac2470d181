"""Random states of a rank: Python, numpy, torch on CPU and CUDA, and megatron-core's streams."""

import random
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel


def random_state() -> dict[str, Any]:
    """The state of every generator of this rank, as plain data and tensors.

    Plain, because megatron-core reads checkpoints with `torch.load(weights_only=True)`.
    """
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)
    name, keys, position, has_gauss, cached = state
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, cached),
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "streams": dict(tensor_parallel.get_cuda_rng_tracker().get_states()),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put this rank's generators into a state that `random_state` returned."""
    random.setstate(_as_tuples(state["python"]))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["streams"])


def reseed(seed: int, iteration: int) -> None:
    """Seed all generators from the run's seed and an iteration.

    For a checkpoint of another layout, whose per-rank states have no counterpart here.
    """
    mixed = (seed + 1_000_003 * iteration) % 2**31
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)
    tensor_parallel.model_parallel_cuda_manual_seed(
        mixed, te_rng_tracker=False, force_reset_rng=True
    )


def _as_tuples(value: Any) -> Any:
    """Lists to tuples, all the way down: a checkpoint may have turned one into the other."""
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value
