"""Which passes a training iteration runs."""

import hashlib

from megatron_ponder.config.schema import MethodConfig
from megatron_ponder.ponder.method import Method
from megatron_ponder.ponder.plan import PassPlan


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


def training_plan(method: Method, num_jacobi_iterations: int) -> PassPlan:
    """The passes of a training forward, with as much gradient as the run asks for."""
    plan = method.plan(num_jacobi_iterations)
    return plan.with_grad_passes(method.config.jacobi_grad_passes)


def possible_plans(method: Method) -> list[PassPlan]:
    """The plans that training may draw, by rising R."""
    config = method.config
    if not config.random_jacobi_iterations:
        return [training_plan(method, config.num_jacobi_iterations)]
    choices = range(config.min_jacobi_iterations, config.max_jacobi_iterations + 1)
    return [training_plan(method, r) for r in choices]
