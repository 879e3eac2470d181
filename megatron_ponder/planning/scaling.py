"""A run on growing numbers of devices, on paper: the best layout of each, and what it would cost.

The global batch stays as it is. For every number of devices all layouts below are tried; those that
training would refuse (config/resolve.py) or that do not fit the memory of a device (memory.py) are
left out; of the others the one with the shortest predicted step (scaling_time.py) is taken, and
among those within 1% of it the one that cuts the model least, recomputes least, and has the largest
micro-batch:

    tensor parallel   powers of two up to a node, always with sequence parallelism
    pipeline          divisors of the layers, with 1, 2 or 3 chunks of layers per stage, overlapped
    context           powers of two, down to 512 tokens of a sequence on a rank
    micro-batch       powers of two
    recomputation     none, of passes, of layers
    data parallel     the rest of the devices, with the distributed optimizer; gradients and weights
                      travel overlapped where that is exact

The same layout is then given to a model without thoughts: what passes cost is the difference. As it
need not be that model's best layout, its own best one is told too.

Left out: uneven pipeline ends, partial recomputation, fewer passes with a gradient.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from megatron_ponder import log
from megatron_ponder.config.layout import data_parallel_size
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import ConfigError
from megatron_ponder.model.size import forward_flops
from megatron_ponder.planning.communication import stage_traffic
from megatron_ponder.planning.memory import StageMemory, stage_memory
from megatron_ponder.planning.recompute import KEEP_ALL
from megatron_ponder.planning.report import (
    largest_plan,
    microbatches_per_step,
    possible_r,
    resolve_on_paper,
)
from megatron_ponder.planning.scaling_options import ScalingOptions
from megatron_ponder.planning.scaling_time import StepClock
from megatron_ponder.ponder.chunks import cut_into_chunks
from megatron_ponder.ponder.method import load_method
from megatron_ponder.ponder.training_plan import possible_plans

COMPARED_METHOD = "vanilla"
BYTES_PER_GIB = 1 << 30
SAME_TIME = 1.01
"""Steps whose predictions differ by less are not told apart."""
FEWEST_TOKENS = 512
"""Of a sequence on a context-parallel rank."""
LAYER_CHUNKS = (1, 2, 3)
RECOMPUTED = (None, "selective", "pass", "full")
SENT_KINDS = ("tensor", "context", "pipeline", "data")
MEMORY_KINDS = ("parameters", "gradients", "optimizer", "activations")
ALIVE_GROUPS = 3
"""Groups of as many micro-batches as stages, after which a step's memory does not grow."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Candidate:
    """A layout that training accepts."""

    config: ResolvedConfig
    clock: StepClock

    @property
    def simplicity(self) -> tuple[int, int, int, int]:
        """Of equally fast ones the smallest is taken."""
        parallel, training = self.config.parallel, self.config.training
        cuts = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
        return (
            cuts * parallel.context_parallel_size,
            parallel.num_virtual_stages_per_pipeline_rank,
            RECOMPUTED.index(training.recompute_granularity),
            -training.micro_batch_size,
        )


def plan_scaling(options: ScalingOptions, config: RunConfig) -> dict[str, Any]:
    """Best layouts and their predictions.

    Args:
        options: devices, links and rates.
        config: as given, with its global batch; its layout, micro-batch and recomputation are not
            used.

    Returns:
        What is printed, by name: `assumed`, `run`, and `rows`, one for each number of devices, with
        `layout` None where nothing fits.

    Raises:
        ConfigError: the settings do not fit together, or no global batch is given.
    """
    if config.training.global_batch_size is None:
        raise ConfigError(
            "scaling needs the batch that all numbers of devices share: --global-batch-size."
        )
    base = config.replaced(**_layout(tensor=1, pipeline=1, context=1, micro_batch=1))
    base = resolve_on_paper(base, world_size=1)
    rows = []
    sizes = sorted(set(options.world_sizes))
    with log.progress(len(sizes), "looking for layouts", " world sizes") as bar:
        for world_size in sizes:
            rows.append(_row(options, base, world_size))
            bar.update()
    model, training = base.model, base.training
    return {
        "predicted": True,
        "assumed": {
            name: value
            for name, value in dataclasses.asdict(options).items()
            if name not in ("world_sizes", "picture", "json")
        },
        "run": {
            "method": base.method.method,
            "num_latent_thoughts": base.method.num_latent_thoughts,
            "num_jacobi_iterations": possible_r(base.method)[-1],
            "num_layers": model.num_layers,
            "hidden_size": model.hidden_size,
            "seq_length": base.data.seq_length,
            "global_batch_size": training.global_batch_size,
            "bf16": training.bf16,
            "compared_method": COMPARED_METHOD,
        },
        "rows": rows,
    }


def _row(options: ScalingOptions, base: ResolvedConfig, world_size: int) -> dict[str, Any]:
    """One number of devices."""
    best, num_accepted = find_layout(options, base, world_size)
    row: dict[str, Any] = {"world_size": world_size, "num_accepted_layouts": num_accepted}
    if best is None:
        return row | {"layout": None, "ours": None, "compared": None, "compared_best": None}
    changes: dict[str, Any] = {"method": COMPARED_METHOD, "random_jacobi_iterations": False}
    compared = resolve(best.replaced(**changes), world_size=world_size)
    # It needs less memory in every layout, so that at least one fits.
    compared_best, _ = find_layout(options, base.replaced(**changes), world_size)
    assert compared_best is not None
    return row | {
        "layout": describe_layout(best, world_size),
        "ours": predict(options, best, world_size),
        "compared": predict(options, compared, world_size),
        "compared_best": {"layout": describe_layout(compared_best, world_size)}
        | predict(options, compared_best, world_size),
    }


def describe_layout(config: ResolvedConfig, world_size: int) -> dict[str, Any]:
    """What the search has chosen.

    Args:
        config: resolved.
        world_size: devices.
    """
    parallel, training = config.parallel, config.training
    return {
        "tensor_parallel": parallel.tensor_model_parallel_size,
        "pipeline_parallel": parallel.pipeline_model_parallel_size,
        "layer_chunks_per_stage": parallel.num_virtual_stages_per_pipeline_rank,
        "context_parallel": parallel.context_parallel_size,
        "data_parallel": data_parallel_size(config, world_size),
        "micro_batch_size": training.micro_batch_size,
        "num_microbatches": microbatches_per_step(config, world_size),
        "recompute_granularity": training.recompute_granularity,
        "overlap_grad_reduce": parallel.overlap_grad_reduce,
    }


def find_layout(
    options: ScalingOptions, base: ResolvedConfig, world_size: int
) -> tuple[ResolvedConfig | None, int]:
    """The best layout, resolved, and how many training would accept.

    Args:
        options: devices, links and rates.
        base: resolved for one device.
        world_size: devices.
    """
    candidates = [
        _Candidate(config=config, clock=StepClock(options, config, world_size))
        for config in accepted_layouts(options, base, world_size)
    ]
    available = options.device_memory_gib * BYTES_PER_GIB
    least_s, timed = float("inf"), []
    for candidate in sorted(candidates, key=lambda one: one.clock.bound_s):
        if candidate.clock.bound_s > SAME_TIME * least_s:
            break
        if _fullest(candidate.config, world_size).total > available:
            continue
        total_s = candidate.clock.time_step().total_s
        least_s = min(least_s, total_s)
        timed.append((candidate, total_s))
    fast = [candidate for candidate, total_s in timed if total_s <= SAME_TIME * least_s]
    best = min(fast, key=lambda one: one.simplicity).config if fast else None
    return best, len(candidates)


def accepted_layouts(
    options: ScalingOptions, base: ResolvedConfig, world_size: int
) -> Iterator[ResolvedConfig]:
    """All layouts that are tried and that training would accept, resolved.

    Args:
        options: devices.
        base: resolved for one device.
        world_size: devices.
    """
    tensor = _powers_of_two(min(options.devices_per_node, world_size))
    num_layers = base.model.num_layers
    pipeline = [size for size in range(1, num_layers + 1) if num_layers % size == 0]
    context = _powers_of_two(max(base.data.seq_length // FEWEST_TOKENS, 1))
    micro_batch = _powers_of_two(options.largest_micro_batch_size)
    for t, p, c, b in itertools.product(tensor, pipeline, context, micro_batch):
        if world_size % (t * p * c):
            continue
        replicas = world_size // (t * p * c)
        if base.training.global_batch_size % (replicas * b * p):
            continue
        for v, recomputed in itertools.product(LAYER_CHUNKS if p > 1 else (1,), RECOMPUTED):
            if num_layers % (p * v):
                continue
            changes = _layout(
                tensor=t,
                pipeline=p,
                context=c,
                micro_batch=b,
                layer_chunks=v,
                recomputed=recomputed,
            )
            changes["use_distributed_optimizer"] = replicas * c > 1
            overlaps = replicas * c > 1 and _can_overlap(base, p, recomputed)
            changes["overlap_grad_reduce"] = changes["overlap_param_gather"] = overlaps
            try:
                yield resolve(base.replaced(**changes), world_size=world_size)
            except ConfigError:
                continue  # heads, widths or the sequence do not divide


def _layout(
    *,
    tensor: int,
    pipeline: int,
    context: int,
    micro_batch: int,
    layer_chunks: int = 1,
    recomputed: str | None = None,
) -> dict[str, Any]:
    """Settings of a layout; whatever else a run may have said about it is undone."""
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
        "recompute_granularity": recomputed,
        "use_distributed_optimizer": False,
        "overlap_grad_reduce": False,
        "overlap_param_gather": False,
    }


def _can_overlap(base: ResolvedConfig, pipeline: int, recomputed: str | None) -> bool:
    """Whether reducing during the backward is exact (docs/parallelism.md, Overlaps)."""
    if base.method.jacobi_grad_passes is not None:
        return False
    counts = {len(plan.passes) for plan in possible_plans(load_method(base.method))}
    return len(counts) == 1 or (pipeline == 1 and recomputed in (None, "selective"))


def _powers_of_two(most: int) -> list[int]:
    return [1 << exponent for exponent in range(most.bit_length())]


def _fullest(config: ResolvedConfig, world_size: int) -> StageMemory:
    """Memory of the stage that needs most."""
    num_microbatches = microbatches_per_step(config, world_size)
    most = ALIVE_GROUPS * config.parallel.pipeline_model_parallel_size
    stages = stage_memory(config, largest_plan(config), world_size, min(num_microbatches, most))
    return max(stages, key=lambda stage: stage.total)


def predict(options: ScalingOptions, config: ResolvedConfig, world_size: int) -> dict[str, Any]:
    """Time, communication and memory of a run on one layout.

    Args:
        options: devices, links and rates.
        config: resolved.
        world_size: devices.
    """
    plan = largest_plan(config)
    clock = StepClock(options, config, world_size)
    time, memory = clock.time_step(), _fullest(config, world_size)
    tokens_per_s = config.training.global_batch_size * config.data.seq_length / time.total_s
    flops = forward_flops(config.model, plan, config.data.seq_length).training
    sent = stage_traffic(config, plan, world_size, clock.num_microbatches)
    per_step = {kind: max(getattr(stage, kind) for stage in sent) for kind in SENT_KINDS}
    per_step["data"] += max(stage.embedding for stage in sent)
    return {
        "step_s": time.total_s,
        "time_s": dataclasses.asdict(time),
        "bubble": time.bubble_s / (time.total_s - time.data_s),
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_device": tokens_per_s / world_size,
        "tflops_per_device": tokens_per_s / config.data.seq_length * flops / world_size / 1e12,
        "sent_bytes_per_step": per_step,
        "sent_bytes_per_pass": _sent_by_pass(clock),
        "memory_bytes": {kind: getattr(memory, kind) for kind in MEMORY_KINDS},
        "fits": memory.total <= options.device_memory_gib * BYTES_PER_GIB,
    }


def _sent_by_pass(clock: StepClock) -> list[dict[str, int]]:
    """Bytes sent for one micro-batch in each pass, forward and backward, by the busiest stage."""
    parallel = clock.config.parallel
    chunks = cut_into_chunks(
        largest_plan(clock.config), parallel.num_virtual_stages_per_pipeline_rank
    )
    passes = []
    for index in range(chunks[-1].pass_.index + 1):
        mine = [chunk for chunk in chunks if chunk.pass_.index == index]
        passes.append(
            {
                "tensor": max(sum(map(s.tensor_bytes, mine)) for s in clock.traffic),
                "context": max(sum(map(s.context_bytes, mine)) for s in clock.traffic),
                "pipeline": max(
                    sum(s.pipeline_bytes(chunk, len(chunks)) for chunk in mine)
                    for s in clock.traffic
                ),
            }
        )
    return passes
