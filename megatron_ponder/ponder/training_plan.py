"""The passes of a training iteration, and the settings that do not support a random R."""

import hashlib

from megatron_ponder.config.schema import MethodConfig, RunConfig
from megatron_ponder.errors import ConfigError
from megatron_ponder.ponder.method import Method
from megatron_ponder.ponder.plan import PassPlan


def jacobi_iterations(config: MethodConfig, seed: int, iteration: int) -> int:
    """R of one training iteration: fixed, or uniform over [min, max]. A pure function.

    The draw is a hash of (seed, iteration) and needs no generator state, so every rank, every
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
    """Every R that training may draw, ascending."""
    if config.random_jacobi_iterations:
        return range(config.min_jacobi_iterations, config.max_jacobi_iterations + 1)
    return range(config.num_jacobi_iterations, config.num_jacobi_iterations + 1)


def training_plan(method: Method, num_jacobi_iterations: int) -> PassPlan:
    """The passes of a training forward; --jacobi-grad-passes limits those with a gradient."""
    plan = method.plan(num_jacobi_iterations)
    return plan.with_grad_passes(method.config.jacobi_grad_passes)


def possible_plans(method: Method) -> list[PassPlan]:
    """The plans of every R that training may draw, ascending."""
    return [training_plan(method, r) for r in possible_jacobi_iterations(method.config)]


def check_hook_counts(config: RunConfig, method: Method) -> None:
    """Refuse an overlapped reduction that could start before a gradient is complete.

    `parallel.parallel_model` explains how megatron-core counts gradients.

    Args:
        config: resolved, with --overlap-grad-reduce.
        method: the method of the run.

    Raises:
        ConfigError: each pass has its own backward call and the number of passes varies; or the
            embedding gets no gradient, which megatron-core would wait for.
    """
    if not all(map(_has_gradient_of_embedding, possible_plans(method))):
        raise ConfigError(
            f"--overlap-grad-reduce with --jacobi-grad-passes {config.method.jacobi_grad_passes}: "
            "none of the passes with a gradient uses the embedding table (for lookup, or for "
            "mixing), so the reduction would wait for a gradient that never comes "
            f"(--method {config.method.method}). Remove --overlap-grad-reduce or "
            "--jacobi-grad-passes."
        )
    pipelined = config.parallel.pipeline_model_parallel_size > 1
    recomputed = config.training.recompute_granularity in ("full", "pass")
    if not pipelined and not recomputed:
        return
    counts = {len(p.passes) - p.first_grad_pass for p in possible_plans(method)}
    if len(counts) > 1:
        why = "--pipeline-model-parallel-size" if pipelined else "--recompute-granularity"
        raise ConfigError(
            f"--overlap-grad-reduce with {why} and a random R: the reduction starts once a "
            "gradient has as many contributions as in the first step. The steps of this run have "
            f"from {min(counts)} to {max(counts)} passes with a gradient, so it could start before "
            "a gradient is complete, or never. Remove --overlap-grad-reduce, or fix R (no "
            "--random-jacobi-iterations), or fix the number of passes with a gradient "
            "(--jacobi-grad-passes)."
        )


def _has_gradient_of_embedding(plan: PassPlan) -> bool:
    """Whether the embedding, and its copy on the last pipeline stage, get a gradient."""
    passes = [pass_ for pass_ in plan.passes if plan.has_grad(pass_)]
    mixes = not plan.mixes_embeddings or any(pass_.mixes_embeddings for pass_ in passes)
    return mixes and any(pass_.embeds_tokens for pass_ in passes)
