"""A run on growing numbers of devices, on paper: the best layout of each, and what it would cost.

The global batch stays as it is. For every number of devices all layouts below are tried. Layouts
that training would refuse (config/resolve.py) or that do not fit the memory of a device (memory.py)
are dropped; of the others the one with the shortest predicted step (scaling_time.py) is taken.
Among layouts within 1% of it, the one that cuts the model least, recomputes least, and has the
largest micro-batch wins:

    tensor parallel   powers of two up to a node, always with sequence parallelism
    pipeline          divisors of the layers, with 1, 2 or 3 chunks of layers per stage, overlapped
    context           powers of two, down to 512 tokens of a sequence on a rank
    micro-batch       powers of two
    recompute         none, selective, of passes, of layers
    data parallel     the rest of the devices, with the distributed optimizer; the communication of
                      gradients and weights is overlapped where that is exact

The same layout is then given to a model without thoughts: the difference is what passes cost. As
that need not be its best layout, its own best one is reported too.

Left out: uneven pipeline ends, recompute of some layers or passes, fewer passes with a gradient.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

from megatron_ponder import log
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import ConfigError
from megatron_ponder.model.size import forward_flops
from megatron_ponder.planning.communication import stage_traffic
from megatron_ponder.planning.limits import KEEP_ALL, Settings
from megatron_ponder.planning.memory import StageMemory, stage_memory
from megatron_ponder.planning.options import ScalingOptions
from megatron_ponder.planning.run import GIB, PlannedRun
from megatron_ponder.planning.scaling_time import StepClock
from megatron_ponder.ponder.training_plan import check_hook_counts

COMPARED_METHOD = "vanilla"
COMPARED: Settings = {"method": COMPARED_METHOD, "random_jacobi_iterations": False}
SAME_TIME = 1.01
"""Steps whose predictions differ by less count as equal."""
FEWEST_TOKENS = 512
"""Of a sequence on a context-parallel rank."""
LAYER_CHUNKS = (1, 2, 3)
GRANULARITIES = (None, "selective", "pass", "full")
SENT_KINDS = ("tensor", "context", "pipeline", "data")
MEMORY_KINDS = ("parameters", "gradients", "optimizer", "activations")
ALIVE_GROUPS = 3
"""Groups of as many micro-batches as stages, after which a step's memory does not grow."""


def plan_scaling(options: ScalingOptions, config: RunConfig) -> dict[str, Any]:
    """Best layouts and their predictions.

    Args:
        options: devices, links and rates.
        config: as given, with its global batch; its layout, micro-batch and recompute settings are
            not used.

    Returns:
        What is printed, by name: `assumed`, `run`, and `rows`, one for each number of devices, with
        `layout` None where nothing fits.

    Raises:
        ConfigError: the settings do not fit together, or no global batch is given.
    """
    if config.training.global_batch_size is None:
        raise ConfigError(
            "scaling needs one global batch for all numbers of devices: give --global-batch-size."
        )
    base = PlannedRun.resolved(config.replaced(**_layout()), world_size=1)
    rows = []
    sizes = sorted(set(options.world_sizes))
    with log.progress(len(sizes), "searching layouts", " world sizes") as bar:
        for world_size in sizes:
            rows.append(_row(options, base, world_size))
            bar.update()
    assumed = dataclasses.asdict(options)
    for name in ("world_sizes", "picture", "json"):
        del assumed[name]
    model, training = base.config.model, base.config.training
    return {
        "predicted": True,
        "assumed": assumed,
        "run": {
            "method": base.config.method.method,
            "num_latent_thoughts": base.config.method.num_latent_thoughts,
            "num_jacobi_iterations": base.largest_r,
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "seq_length": base.config.data.seq_length,
            "global_batch_size": training.global_batch_size,
            "bf16": training.bf16,
            "compared_method": COMPARED_METHOD,
        },
        "rows": rows,
    }


def _row(options: ScalingOptions, base: PlannedRun, world_size: int) -> dict[str, Any]:
    """One number of devices."""
    best, num_accepted = find_layout(options, base, world_size)
    row: dict[str, Any] = {"world_size": world_size, "num_accepted_layouts": num_accepted}
    if best is None:
        return row | {"layout": None, "ours": None, "compared": None, "compared_best": None}
    # It needs less memory in every layout, so that at least one fits.
    compared_best, _ = find_layout(options, base.changed(**COMPARED), world_size)
    assert compared_best is not None
    return row | {
        "layout": describe_layout(best),
        "ours": predict(options, best),
        "compared": predict(options, best.changed(**COMPARED)),
        "compared_best": {"layout": describe_layout(compared_best)}
        | predict(options, compared_best),
    }


def describe_layout(run: PlannedRun) -> dict[str, Any]:
    """What the search has chosen."""
    parallel, training = run.config.parallel, run.config.training
    return {
        "tensor_parallel": parallel.tensor_model_parallel_size,
        "pipeline_parallel": parallel.pipeline_model_parallel_size,
        "layer_chunks_per_stage": parallel.num_virtual_stages_per_pipeline_rank,
        "context_parallel": parallel.context_parallel_size,
        "data_parallel": run.replicas,
        "micro_batch_size": training.micro_batch_size,
        "num_microbatches": run.num_microbatches,
        "recompute_granularity": training.recompute_granularity,
        "overlap_grad_reduce": parallel.overlap_grad_reduce,
    }


def find_layout(
    options: ScalingOptions, base: PlannedRun, world_size: int
) -> tuple[PlannedRun | None, int]:
    """The best layout, and how many training would accept.

    Args:
        options: devices, links and rates.
        base: on one device.
        world_size: devices.
    """
    clocks = [StepClock(options, run) for run in accepted_layouts(options, base, world_size)]
    available = options.device_memory_gib * GIB
    least_s, timed = float("inf"), []
    for clock in sorted(clocks, key=lambda one: one.bound_s):
        if clock.bound_s > SAME_TIME * least_s:
            break
        if _peak_stage(clock.run).total > available:
            continue
        total_s = clock.time_step().total_s
        least_s = min(least_s, total_s)
        timed.append((clock.run, total_s))
    fast = [run for run, total_s in timed if total_s <= SAME_TIME * least_s]
    return min(fast, key=_complexity, default=None), len(clocks)


def _complexity(run: PlannedRun) -> tuple[int, int, int, int]:
    """Of equally fast layouts the one with the smallest is taken."""
    parallel, training = run.config.parallel, run.config.training
    return (
        parallel.tensor_model_parallel_size * run.num_stages * parallel.context_parallel_size,
        parallel.num_virtual_stages_per_pipeline_rank,
        GRANULARITIES.index(training.recompute_granularity),
        -training.micro_batch_size,
    )


def accepted_layouts(
    options: ScalingOptions, base: PlannedRun, world_size: int
) -> Iterator[PlannedRun]:
    """All layouts that are tried and that training would accept.

    Args:
        options: devices.
        base: on one device.
        world_size: devices.
    """
    model, seq_length = base.config.model, base.config.data.seq_length
    global_batch_size = base.config.training.global_batch_size
    tensor = _powers_of_two(min(options.devices_per_node, world_size))
    pipeline = [size for size in range(1, model.num_layers + 1) if model.num_layers % size == 0]
    context = _powers_of_two(max(seq_length // FEWEST_TOKENS, 1))
    micro_batch = _powers_of_two(options.largest_micro_batch_size)
    # Not resolved: a copy with other settings takes a quarter of the time.
    config = RunConfig.from_flat_dict(base.config.to_flat_dict())
    for t, p, c, b in itertools.product(tensor, pipeline, context, micro_batch):
        # Resolving would refuse these too, but takes longer.
        if world_size % (t * p * c) or global_batch_size % (world_size // (t * p * c) * b * p):
            continue
        has_replicas = world_size > t * p
        for v, recompute in itertools.product(LAYER_CHUNKS if p > 1 else (1,), GRANULARITIES):
            settings = _layout(t, p, c, b, v, recompute)
            overlaps = has_replicas and _overlap_is_exact(base, p, recompute)
            settings["use_distributed_optimizer"] = has_replicas
            settings["overlap_grad_reduce"] = settings["overlap_param_gather"] = overlaps
            try:
                yield PlannedRun.resolved(config.replaced(**settings), world_size)
            except ConfigError:
                continue  # heads, widths, layers or the sequence do not divide


def _layout(
    tensor: int = 1,
    pipeline: int = 1,
    context: int = 1,
    micro_batch: int = 1,
    layer_chunks: int = 1,
    recompute: str | None = None,
) -> Settings:
    """Settings of a layout; they replace everything that a run may have said about it."""
    return {
        "tensor_model_parallel_size": tensor,
        "sequence_parallel": tensor > 1,
        "pipeline_model_parallel_size": pipeline,
        "num_virtual_stages_per_pipeline_rank": layer_chunks,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "overlap_p2p_communication": pipeline > 1,
        "context_parallel_size": context,
        "micro_batch_size": micro_batch,
        **KEEP_ALL,
        "recompute_granularity": recompute,
        "use_distributed_optimizer": False,
        "overlap_grad_reduce": False,
        "overlap_param_gather": False,
    }


@functools.lru_cache
def _overlap_is_exact(base: PlannedRun, pipeline: int, recompute: str | None) -> bool:
    """Whether gradients may be reduced during the backward."""
    settings = {"pipeline_model_parallel_size": pipeline, "recompute_granularity": recompute}
    config = base.config.replaced(**settings)
    try:
        check_hook_counts(config, base.method)
    except ConfigError:
        return False
    return True


def _powers_of_two(most: int) -> list[int]:
    return [1 << exponent for exponent in range(most.bit_length())]


def _peak_stage(run: PlannedRun) -> StageMemory:
    """Memory of the stage that needs most."""
    num_microbatches = min(run.num_microbatches, ALIVE_GROUPS * run.num_stages)
    return max(stage_memory(run, num_microbatches), key=lambda stage: stage.total)


def predict(options: ScalingOptions, run: PlannedRun) -> dict[str, Any]:
    """Time, communication and memory of a run on its layout.

    Args:
        options: devices, links and rates.
        run: the run.
    """
    clock, seq_length = StepClock(options, run), run.config.data.seq_length
    time, memory, traffic = clock.time_step(), _peak_stage(run), stage_traffic(run)
    sequences_per_s = run.config.training.global_batch_size / time.total_s
    flops = forward_flops(run.config.model, run.plan, seq_length).training
    per_step = {kind: max(getattr(stage, kind) for stage in traffic) for kind in SENT_KINDS}
    per_step["data"] += max(stage.embedding for stage in traffic)
    return {
        "step_s": time.total_s,
        "time_s": dataclasses.asdict(time),
        "bubble": time.bubble_s / (time.total_s - time.data_s),
        "tokens_per_s": sequences_per_s * seq_length,
        "tokens_per_s_per_device": sequences_per_s * seq_length / run.world_size,
        "tflops_per_device": sequences_per_s * flops / run.world_size / 1e12,
        "sent_bytes_per_step": per_step,
        "sent_bytes_per_pass": _sent_by_pass(clock),
        "memory_bytes": {kind: getattr(memory, kind) for kind in MEMORY_KINDS},
        "fits": memory.total <= options.device_memory_gib * GIB,
    }


def _sent_by_pass(clock: StepClock) -> list[dict[str, int]]:
    """Bytes sent for one micro-batch in each pass, forward and backward, by the busiest stage."""
    by_pass = []
    for pass_ in clock.run.plan.passes:
        chunks = [chunk for chunk in clock.run.chunks if chunk.pass_ is pass_]
        by_stage = [
            {
                "tensor": sum(map(stage.tensor_bytes, chunks)),
                "context": sum(map(stage.context_bytes, chunks)),
                "pipeline": sum(map(stage.pipeline_bytes, chunks)),
            }
            for stage in clock.traffic
        ]
        by_pass.append({kind: max(sent[kind] for sent in by_stage) for kind in by_stage[0]})
    return by_pass
