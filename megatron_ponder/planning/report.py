"""Everything that can be said about a run before it runs, as one dictionary.

What depends on R is for the largest R that the run can draw, except FLOPs of a step, which are the
mean over R. Left out: what only a measurement knows, such as the speed of a device and the time of
a message. Seconds are FLOPs over an assumed rate.
"""

import dataclasses
import statistics
from typing import Any

from megatron_ponder.model.size import count_parameters, forward_flops
from megatron_ponder.planning.communication import stage_traffic
from megatron_ponder.planning.flops import chunk_flops, simulate_step
from megatron_ponder.planning.limits import find_limits, find_remedies
from megatron_ponder.planning.memory import stage_memory
from megatron_ponder.planning.options import PlanOptions
from megatron_ponder.planning.run import GIB, PlannedRun
from megatron_ponder.planning.timeline import Timeline, equal_chunks_bubble
from megatron_ponder.ponder.training_plan import possible_jacobi_iterations, possible_plans


def plan_run(options: PlanOptions, run: PlannedRun) -> dict[str, Any]:
    """The report.

    Args:
        options: rate and memory of a device.
        run: the run.

    Raises:
        ConfigError: the method is unknown, or the pipeline cannot run so many micro-batches.
    """
    config, parallel = run.config, run.config.parallel
    r_values = list(possible_jacobi_iterations(config.method))
    memory = stage_memory(run)
    peak = max(stage.total for stage in memory)
    result: dict[str, Any] = {
        "ranks": {
            "world_size": run.world_size,
            "tensor_parallel": parallel.tensor_model_parallel_size,
            "pipeline_parallel": run.num_stages,
            "layer_chunks_per_stage": parallel.num_virtual_stages_per_pipeline_rank,
            "context_parallel": parallel.context_parallel_size,
            "data_parallel": run.replicas,
        },
        "num_jacobi_iterations": {"planned_for": run.largest_r, "drawn_from": r_values},
        "parameters": dataclasses.asdict(count_parameters(config.model))
        | {"per_rank": [stage.num_parameters for stage in memory]},
        "step": _step(run),
        "passes": _passes(run),
        "schedule": _schedule(simulate_step(run, options.assumed_tflops)),
        "memory": [
            {"stage": stage.index, "layers": stage.num_layers}
            | {k: v for k, v in dataclasses.asdict(found).items() if k != "num_parameters"}
            | {"total": found.total, "total_gib": found.total / GIB}
            for stage, found in zip(run.stages, memory, strict=True)
        ],
        "sent_bytes": [dataclasses.asdict(traffic) for traffic in stage_traffic(run)],
        "limits": find_limits(run),
    }
    if options.device_memory_gib is not None:
        available = options.device_memory_gib * GIB
        result["fits"] = peak <= available
        result["device_memory_gib"] = options.device_memory_gib
        result["remedies"] = [] if result["fits"] else find_remedies(run, available)
    return result


def _step(run: PlannedRun) -> dict[str, Any]:
    """Work of a step over all ranks."""
    training, seq_length = run.config.training, run.config.data.seq_length
    parallel, sequences = run.config.parallel, training.global_batch_size
    plans = possible_plans(run.method)
    by_r = [forward_flops(run.config.model, plan, seq_length) for plan in plans]
    both = statistics.fmean(one.training for one in by_r)
    recomputed = sum(map(sum, chunk_flops(run).recomputed)) / training.micro_batch_size
    recomputed *= parallel.tensor_model_parallel_size * parallel.context_parallel_size
    return {
        "sequences": sequences,
        "tokens": sequences * seq_length,
        "num_microbatches": run.num_microbatches,
        "forward_flops_per_token": statistics.fmean(one.total for one in by_r) / seq_length,
        "training_flops_per_token": both / seq_length,
        "training_flops": both * sequences,
        "recomputed_flops": recomputed * sequences,
        "run_tokens": sequences * seq_length * training.train_iters,
    }


def _passes(run: PlannedRun) -> list[dict[str, Any]]:
    """A row for each pass."""
    flops = forward_flops(run.config.model, run.plan, run.config.data.seq_length)
    return [
        {
            "index": pass_.index,
            "slots_per_token": pass_.slots_per_token,
            "output_slots": list(pass_.output_slots),
            "has_gradient": cost.has_grad,
            "forward_flops": cost.total,
            "share": cost.total / flops.total,
        }
        for pass_, cost in zip(run.plan.passes, flops.passes, strict=True)
    ]


def _schedule(timeline: Timeline) -> dict[str, Any]:
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
