"""Which passes a training iteration runs, and when a random number of them is refused."""

import hashlib

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.config.schema import MethodConfig
from megatron_ponder.errors import ConfigError
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
    choices = possible_jacobi_iterations(config)
    digest = hashlib.blake2b(f"jacobi:{seed}:{iteration}".encode(), digest_size=8).digest()
    return choices[int.from_bytes(digest, "big") % len(choices)]


def possible_jacobi_iterations(config: MethodConfig) -> range:
    """Every R that training may run, ascending."""
    if config.random_jacobi_iterations:
        return range(config.min_jacobi_iterations, config.max_jacobi_iterations + 1)
    return range(config.num_jacobi_iterations, config.num_jacobi_iterations + 1)


def training_plan(method: Method, num_jacobi_iterations: int) -> PassPlan:
    """The passes of a training forward, with as much gradient as the run asks for."""
    plan = method.plan(num_jacobi_iterations)
    return plan.with_grad_passes(method.config.jacobi_grad_passes)


def possible_plans(method: Method) -> list[PassPlan]:
    """The plans that training may draw, by rising R."""
    return [training_plan(method, r) for r in possible_jacobi_iterations(method.config)]


def check_hook_counts(config: ResolvedConfig, method: Method) -> None:
    """Refuse an overlapped reduction that could start before a gradient is complete.

    `parallel.parallel_model` says how megatron-core counts gradients.

    Args:
        config: resolved, with --overlap-grad-reduce.
        method: the run's.

    Raises:
        ConfigError: passes have backwards of their own and their number changes between steps; or
            the embedding gets no gradient, which megatron-core waits for.
    """
    if not all(map(_has_gradient_of_embedding, possible_plans(method))):
        raise ConfigError(
            f"--overlap-grad-reduce with --jacobi-grad-passes {config.method.jacobi_grad_passes}: "
            "no pass with a gradient reads the embedding, or mixes it, and reduction would wait "
            f"for a gradient that never comes (--method {config.method.method}). Leave "
            "--overlap-grad-reduce out, or --jacobi-grad-passes."
        )
    pipelined = config.parallel.pipeline_model_parallel_size > 1
    recomputed = config.training.recompute_granularity in ("full", "pass")
    if not pipelined and not recomputed:
        return
    counts = {len(p.passes) - p.first_grad_pass for p in possible_plans(method)}
    if len(counts) > 1:
        why = "--pipeline-model-parallel-size" if pipelined else "--recompute-granularity"
        raise ConfigError(
            f"--overlap-grad-reduce with {why} and a random R: reduction starts when a gradient "
            "has as many parts as in the first step. Steps here have from "
            f"{min(counts)} to {max(counts)} passes with a gradient, so it could start before a "
            "gradient is complete, or never. Leave --overlap-grad-reduce out, or fix R (no "
            "--random-jacobi-iterations), or fix the passes with a gradient (--jacobi-grad-passes)."
        )


def _has_gradient_of_embedding(plan: PassPlan) -> bool:
    """Whether the embedding, and its copy on the last pipeline stage, get a gradient."""
    passes = [pass_ for pass_ in plan.passes if plan.has_grad(pass_)]
    mixes = not plan.mixes_embeddings or any(pass_.mixes_embeddings for pass_ in passes)
    return mixes and any(pass_.embeds_tokens for pass_ in passes)
