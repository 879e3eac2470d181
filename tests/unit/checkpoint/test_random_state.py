"""Random generators go on from where a checkpoint left them."""

import random

import numpy as np
import torch
from megatron.core import tensor_parallel

from megatron_ponder.checkpoint.rng import random_state, reseed, restore_random_state
from megatron_ponder.runtime import distributed
from tests.ranks import run_ranks
from tests.unit.checkpoint.small_run import small_config


def _draw() -> list[float]:
    """A number from every generator."""
    with tensor_parallel.get_cuda_rng_tracker().fork():
        sharded = torch.rand(()).item()
    return [random.random(), float(np.random.rand()), torch.rand(()).item(), sharded]


def _draw_twice(path: str) -> list[list[float]]:
    """Draws after a state, through a file as a checkpoint makes it; and after other draws."""
    config = small_config(distributed.world_size_from_environment(), tensor_model_parallel_size=2)
    distributed.initialize(config.parallel, seed=3)
    np.random.normal()  # leaves half a pair behind, which is part of the state
    random.gauss(0, 1)
    file = f"{path}/{distributed.ranks().rank}"
    torch.save(random_state(), file)
    first = _draw()
    for _ in range(10):
        _draw()
    restore_random_state(torch.load(file, weights_only=True))
    second = _draw()
    reseed(3, 100)
    third = _draw()
    reseed(3, 100)
    fourth = _draw()
    others = []
    for seed, iteration in ((3, 101), (4, 100)):
        reseed(seed, iteration)
        others.append(_draw())
    return [first, second, third, fourth, *others]


def test_states_are_restored_and_seeds_are_reproducible(tmp_path) -> None:
    first_rank, second_rank = run_ranks(_draw_twice, 2, str(tmp_path))
    for first, second, third, fourth, next_iteration, next_seed in (first_rank, second_rank):
        assert first == second
        assert third == fourth
        # Every generator depends on both the seed and the iteration.
        for others in (first, next_iteration, next_seed):
            assert not set(third) & set(others)
    # Where tensor-parallel ranks hold different values they draw differently.
    assert first_rank[0][3] != second_rank[0][3]
