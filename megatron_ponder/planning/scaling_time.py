"""How long a step would take on a given layout: FLOPs, bytes and waiting, turned into seconds.

What is assumed, so that it can be judged:

    compute      counted FLOPs over one rate, whatever the shapes; what selective recomputation
                 makes again has none, and takes 7% of a forward's time
    tensor,      bytes over the slowest link of the group, and a latency for each collective; in the
    context      way of computing, never hidden behind it
    data         gradients are complete in the backward of the first pass of the last micro-batch,
                 and weights are read first in the forward of the first pass: with overlap only what
                 lasts longer than these is counted, without it everything
    pipeline     megatron-core's schedule, simulated (timeline.py), messages taking the time of the
                 largest one; what stages wait is the bubble

Ranks are placed as megatron-core does: tensor, context, data, pipeline, the first innermost. A ring
inside a node has NVLink's rate. One across nodes has the network's, times the number of its ranks
in a node, each of which brings a port, and never more than NVLink's.

Left out: how fast kernels of small shapes are, the optimizer (bound by memory, below 1% of a step
that accumulates), congestion, stragglers, data loading, saving.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable

from megatron_ponder.config.layout import data_parallel_size
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.planning.communication import StageTraffic
from megatron_ponder.planning.report import largest_plan, microbatches_per_step, run_pipeline
from megatron_ponder.planning.scaling_options import ScalingOptions
from megatron_ponder.planning.shards import FP32_BYTES
from megatron_ponder.planning.timeline import Table, simulate
from megatron_ponder.planning.work import ChunkFlops, chunk_flops
from megatron_ponder.ponder.chunks import Chunk, cut_into_chunks

BUCKET_PARAMETERS = 40_000_000
"""megatron-core reduces gradients in buckets of at least so many."""
SELECTIVE_SHARE = 0.07
"""Time of selective recomputation, as a part of a forward's: a step took 1.02 to 1.03 times as long
on CPU (docs/performance.md, cost curves)."""
GROUPS_SIMULATED, GROUPS_REPEATED = 12, 6
"""Groups of as many micro-batches as stages that are simulated, and those at their end whose mean
all later ones take. Where messages are felt, groups alternate with a period of 2 or 3 (tests
compare with whole simulations)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step by what they go to, means over pipeline stages; they add up to the step."""

    compute_s: float
    """Forwards and backwards."""
    recompute_s: float
    """What backwards compute again."""
    tensor_s: float
    context_s: float
    bubble_s: float
    """Waiting for other stages, messages on their way included."""
    data_s: float
    """Gradients and weights among replicas, as far as not hidden; tied embeddings."""

    @property
    def total_s(self) -> float:
        """The step."""
        return sum(dataclasses.astuple(self))


class StepClock:
    """Times one layout; the bound is quick, the step is simulated."""

    def __init__(self, options: ScalingOptions, config: ResolvedConfig, world_size: int) -> None:
        """For a resolved run."""
        self.options, self.config, self.world_size = options, config, world_size
        parallel, plan = config.parallel, largest_plan(config)
        self.num_pipeline_stages = parallel.pipeline_model_parallel_size
        self.num_microbatches = microbatches_per_step(config, world_size)
        self.chunks = cut_into_chunks(plan, parallel.num_virtual_stages_per_pipeline_rank)
        self.traffic = [
            StageTraffic(config, plan, stage) for stage in range(self.num_pipeline_stages)
        ]
        self.flops = _with_cheap_recomputation(config, chunk_flops(config, plan))
        forward_s, backward_s = self.flops.seconds(options.assumed_tflops)
        self.tensor_s = self._by_chunk(self._tensor_s)
        self.context_s = self._by_chunk(self._context_s)
        self.forward_s, self.backward_s = self._with_communication(forward_s, backward_s)

    @property
    def bound_s(self) -> float:
        """No step is shorter: the busiest stage without waiting, nothing to reduce."""
        return self.num_microbatches * max(
            sum(forward) + sum(backward)
            for forward, backward in zip(self.forward_s, self.backward_s, strict=True)
        )

    def time_step(self) -> StepTime:
        """The whole step."""
        rate = self.options.assumed_tflops * 1e12
        times = self.num_microbatches
        useful = [
            sum(forward) + sum(backward)
            for forward, backward in zip(self.flops.forward, self.flops.backward, strict=True)
        ]
        compute_s = times * statistics.fmean(useful) / rate
        recompute_s = times * statistics.fmean(map(sum, self.flops.recomputed)) / rate
        tensor_s = times * statistics.fmean(map(sum, self.tensor_s))
        context_s = times * statistics.fmean(map(sum, self.context_s))
        busy_s = compute_s + recompute_s + tensor_s + context_s
        return StepTime(
            compute_s=compute_s,
            recompute_s=recompute_s,
            tensor_s=tensor_s,
            context_s=context_s,
            bubble_s=max(self._makespan_s() - busy_s, 0.0),
            data_s=max(map(self._data_s, range(self.num_pipeline_stages))),
        )

    def _makespan_s(self) -> float:
        """From the first forward to the last backward, later micro-batches extrapolated."""
        if self.num_pipeline_stages == 1:
            return self.bound_s
        group, groups = self.num_pipeline_stages, self.num_microbatches // self.num_pipeline_stages
        if groups <= GROUPS_SIMULATED:
            return self._simulated_s(self.num_microbatches)
        last_s = self._simulated_s(group * GROUPS_SIMULATED)
        repeated_s = last_s - self._simulated_s(group * (GROUPS_SIMULATED - GROUPS_REPEATED))
        return last_s + (groups - GROUPS_SIMULATED) * repeated_s / GROUPS_REPEATED

    def _simulated_s(self, num_microbatches: int) -> float:
        pipeline = run_pipeline(self.config, num_microbatches)
        return simulate(pipeline, self.forward_s, self.backward_s, self._message_s()).makespan_s

    def _by_chunk(self, seconds: Callable[[StageTraffic, Chunk], float]) -> list[list[float]]:
        return [[seconds(traffic, chunk) for chunk in self.chunks] for traffic in self.traffic]

    def _with_communication(self, forward_s: Table, backward_s: Table) -> tuple[Table, Table]:
        """Communication shared between forward and backward as their computing is."""
        both: tuple[list[list[float]], list[list[float]]] = ([], [])
        for stage in range(self.num_pipeline_stages):
            for table in both:
                table.append([])
            for index in range(len(self.chunks)):
                mine = forward_s[stage][index], backward_s[stage][index]
                more = self.tensor_s[stage][index] + self.context_s[stage][index]
                for table, seconds in zip(both, mine, strict=True):
                    table[stage].append(seconds + more * seconds / sum(mine))
        return both

    def _tensor_s(self, traffic: StageTraffic, chunk: Chunk) -> float:
        """Of one micro-batch; collectives are counted as multiples of the pass's hidden states."""
        size = self.config.parallel.tensor_model_parallel_size
        sent = traffic.tensor_bytes(chunk)
        if not sent:
            return 0.0
        counter = traffic.counter
        whole = counter.hidden_bytes(chunk.pass_.slots_per_token) * counter.shards.sequence_shards
        number = sent / (whole * traffic.tensor_share)
        return sent / self._ring_rate(1, size) + number * self._latency_s

    def _context_s(self, traffic: StageTraffic, chunk: Chunk) -> float:
        """Of one micro-batch: a collective for each gather and each scatter of keys and values."""
        parallel, size = self.config.parallel, traffic.counter.shards
        sent = traffic.context_bytes(chunk)
        if not sent:
            return 0.0
        rows = traffic.counter.rows(chunk.pass_.slots_per_token)
        once = (size.context_parallel_size - 1) * rows * 2 * size.key_value_width
        number = sent / (once * size.element_bytes)
        rate = self._ring_rate(parallel.tensor_model_parallel_size, parallel.context_parallel_size)
        return sent / rate + number * self._latency_s

    def _data_s(self, stage: int) -> float:
        """What a step has to wait for gradients and weights of a stage."""
        parallel, traffic = self.config.parallel, self.traffic[stage]
        replicas = data_parallel_size(self.config, self.world_size) * parallel.context_parallel_size
        embedding = traffic.embedding_bytes()
        exposed_s = embedding / self._message_rate + self._latency_s if embedding else 0.0
        # Gradients of norms, which sequence parallelism sums over tensor-parallel ranks.
        norms = traffic.replicated_gradient_bytes()
        exposed_s += norms / self._ring_rate(1, parallel.tensor_model_parallel_size)
        if replicas == 1:
            return exposed_s
        rate = self._ring_rate(parallel.tensor_model_parallel_size, replicas)
        sent = traffic.data_bytes(self.world_size)
        weight_bytes = FP32_BYTES  # an all-reduce is a reduction and a gather of the same size
        if parallel.use_distributed_optimizer:
            weight_bytes = traffic.counter.shards.element_bytes
        per_parameter = FP32_BYTES + weight_bytes
        parameters = sent * replicas / (replicas - 1) / per_parameter
        latency_s = math.ceil(parameters / BUCKET_PARAMETERS) * self._latency_s
        first = [chunk.index for chunk in self.chunks if chunk.pass_.index == 0]
        for is_hidden, table, share in (
            (parallel.overlap_grad_reduce, self.backward_s, FP32_BYTES),
            (parallel.overlap_param_gather, self.forward_s, weight_bytes),
        ):
            seconds = sent * share / per_parameter / rate + latency_s
            window_s = sum(table[stage][index] for index in first) if is_hidden else 0.0
            exposed_s += max(seconds - window_s, 0.0)
        return exposed_s

    def _message_s(self) -> float:
        """The largest message between stages."""
        largest = max(
            self.traffic[0].counter.hidden_bytes(chunk.sent_per_token) for chunk in self.chunks
        )
        return largest / self._message_rate + self._latency_s

    @property
    def _latency_s(self) -> float:
        return self.options.message_latency_us * 1e-6

    @property
    def _message_rate(self) -> float:
        """Bytes per second from stage to stage; neighbours are in one node if all ranks are."""
        is_inside = self.world_size <= self.options.devices_per_node
        rate = self.options.nvlink_gb_per_s if is_inside else self.options.network_gb_per_s
        return rate * 1e9 * self.options.link_efficiency

    def _ring_rate(self, stride: int, size: int) -> float:
        """Bytes per second of a ring.

        Args:
            stride: ranks from one member to the next.
            size: members.
        """
        options = self.options
        rate = options.nvlink_gb_per_s
        if stride * size > options.devices_per_node:
            ports = max(options.devices_per_node // stride, 1)
            rate = min(rate, options.network_gb_per_s * ports)
        return rate * 1e9 * options.link_efficiency


def _with_cheap_recomputation(config: ResolvedConfig, flops: ChunkFlops) -> ChunkFlops:
    """Selective recomputation as the FLOPs that would take its time; other work as it is."""
    if config.training.recompute_granularity != "selective":
        return flops
    recomputed = [
        [SELECTIVE_SHARE * once * (back > 0) for once, back in zip(*rows, strict=True)]
        for rows in zip(flops.forward, flops.backward, strict=True)
    ]
    return dataclasses.replace(flops, recomputed=recomputed)
