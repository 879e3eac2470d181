"""Everything that can be said about a run before it runs, as one dictionary.

What depends on R is for the largest R that the run can draw, except FLOPs of a step, which are the
mean over R. Left out: what only a measurement knows - how fast a device computes, how long tensors
travel. Seconds are FLOPs over an assumed rate.
"""

import dataclasses
import statistics
from typing import Any

from megatron_ponder.config.layout import data_parallel_size
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.config.schema import MethodConfig, RunConfig
from megatron_ponder.data.tokenizers import build_tokenizer
from megatron_ponder.model.size import count_parameters, forward_flops
from megatron_ponder.planning.communication import stage_traffic
from megatron_ponder.planning.limits import find_limits, find_remedies
from megatron_ponder.planning.memory import stage_memory
from megatron_ponder.planning.options import PlanOptions
from megatron_ponder.planning.order import Pipeline
from megatron_ponder.planning.shards import layers_by_stage
from megatron_ponder.planning.timeline import Timeline, equal_chunks_bubble, simulate
from megatron_ponder.planning.work import chunk_flops
from megatron_ponder.ponder.chunks import cut_into_chunks
from megatron_ponder.ponder.method import load_method
from megatron_ponder.ponder.plan import PassPlan
from megatron_ponder.ponder.training_plan import possible_plans

BYTES_PER_GIB = 1 << 30


def plan_run(options: PlanOptions, config: ResolvedConfig) -> dict[str, Any]:
    """The report.

    Args:
        options: ranks and memory.
        config: resolved for `options.world_size` ranks.

    Raises:
        ConfigError: the method is unknown, or the pipeline cannot run so many micro-batches.
    """
    r_values = possible_r(config.method)
    plan = largest_plan(config)
    num_microbatches = microbatches_per_step(config, options.world_size)
    memory = stage_memory(config, plan, options.world_size, num_microbatches)
    fullest = max(stage.total for stage in memory)
    parallel = config.parallel
    result: dict[str, Any] = {
        "ranks": {
            "world_size": options.world_size,
            "tensor_parallel": parallel.tensor_model_parallel_size,
            "pipeline_parallel": parallel.pipeline_model_parallel_size,
            "layer_chunks_per_stage": parallel.num_virtual_stages_per_pipeline_rank,
            "context_parallel": parallel.context_parallel_size,
            "data_parallel": data_parallel_size(config, options.world_size),
        },
        "num_jacobi_iterations": {"planned_for": r_values[-1], "drawn_from": r_values},
        "parameters": dataclasses.asdict(count_parameters(config.model))
        | {"per_rank": [stage.num_parameters for stage in memory]},
        "step": _step(config, plan, num_microbatches),
        "passes": _passes(config, plan),
        "schedule": _schedule(config, plan, simulate_step(options, config, plan)),
        "memory": [
            {"stage": number, "layers": sum(layers)}
            | {k: v for k, v in dataclasses.asdict(stage).items() if k != "num_parameters"}
            | {"total": stage.total, "total_gib": stage.total / BYTES_PER_GIB}
            for number, (stage, layers) in enumerate(
                zip(memory, layers_by_stage(config), strict=True)
            )
        ],
        "sent_bytes": [
            dataclasses.asdict(stage)
            for stage in stage_traffic(config, plan, options.world_size, num_microbatches)
        ],
        "limits": find_limits(config, options.world_size, num_microbatches),
    }
    if options.device_memory_gib is not None:
        available = options.device_memory_gib * BYTES_PER_GIB
        result["fits"] = fullest <= available
        result["device_memory_gib"] = options.device_memory_gib
        result["remedies"] = (
            [] if result["fits"] else find_remedies(config, plan, options.world_size, available)
        )
    return result


def resolve_on_paper(config: RunConfig, world_size: int) -> ResolvedConfig:
    """The config as a run on `world_size` ranks would resolve it.

    The tokenizer is only looked at where nothing else says the size of the vocabulary.

    Raises:
        ConfigError: training would refuse the settings.
        DataError: the tokenizer is needed and missing.
    """
    if config.checkpoint.save is None:  # recipes leave it to the command line of the run
        config = config.replaced(save_interval=None)
    vocab_size = None
    if config.model.vocab_size is None and config.data.tokenizer_model is not None:
        vocab_size = build_tokenizer(config.data).vocab_size
    return resolve(config, world_size=world_size, tokenizer_vocab_size=vocab_size)


def possible_r(method: MethodConfig) -> list[int]:
    """Every R that training can run, ascending."""
    if method.random_jacobi_iterations:
        return list(range(method.min_jacobi_iterations, method.max_jacobi_iterations + 1))
    return [method.num_jacobi_iterations]


def largest_plan(config: RunConfig) -> PassPlan:
    """The passes of a training forward at the largest R.

    Raises:
        ConfigError: the method is unknown.
    """
    return possible_plans(load_method(config.method))[-1]


def microbatches_per_step(config: ResolvedConfig, world_size: int) -> int:
    """Micro-batches of each data-parallel rank."""
    training = config.training
    per_pass = training.micro_batch_size * data_parallel_size(config, world_size)
    return training.global_batch_size // per_pass


def simulate_step(
    options: PlanOptions,
    config: ResolvedConfig,
    plan: PassPlan,
    num_microbatches: int | None = None,
) -> Timeline:
    """One step on paper, timed by FLOPs.

    Args:
        options: ranks and rate.
        config: resolved.
        plan: the passes.
        num_microbatches: None: as many as the run has.
    """
    forward_s, backward_s = chunk_flops(config, plan).seconds(options.assumed_tflops)
    pipeline = run_pipeline(
        config, num_microbatches or microbatches_per_step(config, options.world_size)
    )
    return simulate(pipeline, forward_s, backward_s)


def run_pipeline(config: ResolvedConfig, num_microbatches: int) -> Pipeline:
    """What the run's stages do in a step with the largest R.

    Args:
        config: resolved.
        num_microbatches: of each data-parallel rank.
    """
    parallel, plan = config.parallel, largest_plan(config)
    chunks = cut_into_chunks(plan, parallel.num_virtual_stages_per_pipeline_rank)
    return Pipeline(
        num_pipeline_stages=parallel.pipeline_model_parallel_size,
        num_chunks=len(chunks),
        num_microbatches=num_microbatches,
        first_grad_chunk=next(chunk.index for chunk in chunks if chunk.has_grad),
        overlap=parallel.overlap_p2p_communication,
    )


def _step(config: ResolvedConfig, plan: PassPlan, num_microbatches: int) -> dict[str, Any]:
    """Work of a step over all ranks."""
    training, seq_length = config.training, config.data.seq_length
    plans = possible_plans(load_method(config.method))
    flops = [forward_flops(config.model, one, seq_length) for one in plans]
    forward = statistics.fmean(one.total for one in flops)
    both = statistics.fmean(one.training for one in flops)
    again = sum(map(sum, chunk_flops(config, plan).recomputed)) / training.micro_batch_size
    again *= config.parallel.tensor_model_parallel_size * config.parallel.context_parallel_size
    tokens = training.global_batch_size * seq_length
    return {
        "sequences": training.global_batch_size,
        "tokens": tokens,
        "num_microbatches": num_microbatches,
        "forward_flops_per_token": forward / seq_length,
        "training_flops_per_token": both / seq_length,
        "training_flops": both * training.global_batch_size,
        "recomputed_flops": again * training.global_batch_size,
        "run_tokens": tokens * training.train_iters,
    }


def _passes(config: ResolvedConfig, plan: PassPlan) -> list[dict[str, Any]]:
    """A row for each pass."""
    flops = forward_flops(config.model, plan, config.data.seq_length).passes
    total = sum(cost.total for cost in flops)
    return [
        {
            "index": pass_.index,
            "slots_per_token": pass_.slots_per_token,
            "output_slots": list(pass_.output_slots),
            "has_gradient": plan.has_grad(pass_),
            "forward_flops": cost.total,
            "share": cost.total / total,
        }
        for pass_, cost in zip(plan.passes, flops, strict=True)
    ]


def _schedule(config: ResolvedConfig, plan: PassPlan, timeline: Timeline) -> dict[str, Any]:
    """The pipeline's step on paper."""
    pipeline = timeline.pipeline
    return {
        "num_chunks": pipeline.num_chunks,
        "num_microbatches": pipeline.num_microbatches,
        "bubble": timeline.bubble,
        "bubble_if_chunks_were_equal": equal_chunks_bubble(
            pipeline.num_pipeline_stages, pipeline.num_microbatches, pipeline.num_chunks
        ),
        "computing_s": timeline.makespan_s,
    }
