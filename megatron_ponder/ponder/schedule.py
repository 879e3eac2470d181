"""How many Jacobi iterations a training iteration runs."""

import hashlib

from megatron_ponder.config.schema import MethodConfig


def jacobi_iterations(config: MethodConfig, seed: int, iteration: int) -> int:
    """R of one training iteration: fixed, or uniform over [min, max], by its arguments alone.

    The draw hashes (seed, iteration), so that it needs no generator state: every rank, every
    micro-batch and every replay of the iteration gets the same R.

    Args:
        config: the method's settings.
        seed: the run's seed.
        iteration: training iteration, from 1.
    """
    if not config.random_jacobi_iterations:
        return config.num_jacobi_iterations
    digest = hashlib.blake2b(f"jacobi:{seed}:{iteration}".encode(), digest_size=8).digest()
    num_choices = config.max_jacobi_iterations - config.min_jacobi_iterations + 1
    return config.min_jacobi_iterations + int.from_bytes(digest, "big") % num_choices
