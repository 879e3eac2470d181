"""How long a step would take on a given layout: FLOPs, bytes and waiting, turned into seconds.

The assumptions, stated so that they can be judged:

    compute      counted FLOPs over one rate, whatever the shapes; selective recompute, which has
                 none, takes 7% of a forward's time
    tensor,      bytes over the slowest link of the group, and a latency for each collective; never
    context      overlapped with compute
    data         gradients are complete in the backward of the first pass of the last micro-batch,
                 and weights are needed first in the forward of the first pass: with overlap only
                 the time beyond these is counted, without it all of it
    pipeline     megatron-core's schedule, simulated (timeline.py); every message takes the time of
                 the largest one; the waiting of stages is the bubble

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

from megatron_ponder.planning.communication import StageTraffic
from megatron_ponder.planning.flops import ChunkFlops, chunk_flops
from megatron_ponder.planning.memory import local_parameters
from megatron_ponder.planning.options import ScalingOptions
from megatron_ponder.planning.run import FP32_BYTES, PlannedRun
from megatron_ponder.planning.timeline import Table, simulate
from megatron_ponder.ponder.chunks import Chunk

BUCKET_PARAMETERS = 40_000_000
"""megatron-core reduces gradients in buckets of at least so many."""
SELECTIVE_SHARE = 0.07
"""Time of selective recompute, as a part of a forward's: a step took 1.02 to 1.03 times as long on
CPU (docs/performance.md, cost curves)."""
GROUPS_SIMULATED, GROUPS_REPEATED = 12, 6
"""Groups of as many micro-batches as stages that are simulated, and how many of the last ones give
the mean time of all later groups. Where messages take time, groups alternate with a period of 2 or
3 (tests compare with whole simulations)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step by kind, means over pipeline stages; they add up to the step."""

    compute_s: float
    """Forwards and backwards."""
    recompute_s: float
    """Forwards that backwards recompute."""
    tensor_s: float
    context_s: float
    bubble_s: float
    """Waiting for other stages and for their messages."""
    data_s: float
    """Gradients and weights among replicas, as far as not overlapped; tied embeddings."""

    @property
    def total_s(self) -> float:
        """The step."""
        return float(sum(dataclasses.astuple(self)))


class StepClock:
    """Times one layout; the bound is quick, the step is simulated.

    Args:
        options: devices, links and rates.
        run: the run.
    """

    def __init__(self, options: ScalingOptions, run: PlannedRun) -> None:
        self.options, self.run = options, run
        self.traffic = [StageTraffic(run, stage) for stage in range(run.num_stages)]
        self.flops = _with_selective_recompute(run, chunk_flops(run))
        self.tensor_s, self.context_s = (
            self._by_chunk(self._tensor_s),
            self._by_chunk(self._context_s),
        )
        self.forward_s, self.backward_s = self._with_communication()

    @property
    def bound_s(self) -> float:
        """No step is shorter: the busiest stage without waiting, nothing to reduce."""
        return self.run.num_microbatches * max(
            sum(forward) + sum(backward)
            for forward, backward in zip(self.forward_s, self.backward_s, strict=True)
        )

    def time_step(self) -> StepTime:
        """The whole step."""

        def mean_s(table: Table) -> float:
            return self.run.num_microbatches * statistics.fmean(map(sum, table))

        rate = self.options.assumed_tflops * 1e12
        busy = {
            "compute_s": (mean_s(self.flops.forward) + mean_s(self.flops.backward)) / rate,
            "recompute_s": mean_s(self.flops.recomputed) / rate,
            "tensor_s": mean_s(self.tensor_s),
            "context_s": mean_s(self.context_s),
        }
        return StepTime(
            **busy,
            bubble_s=max(self._makespan_s() - sum(busy.values()), 0.0),
            data_s=max(map(self._data_s, self.traffic)),
        )

    def _makespan_s(self) -> float:
        """From the first forward to the last backward, later micro-batches extrapolated."""
        group, num_microbatches = self.run.num_stages, self.run.num_microbatches
        if group == 1:
            return self.bound_s
        num_groups = num_microbatches // group
        if num_groups <= GROUPS_SIMULATED:
            return self._simulated_s(num_microbatches)
        last_s = self._simulated_s(group * GROUPS_SIMULATED)
        repeated_s = last_s - self._simulated_s(group * (GROUPS_SIMULATED - GROUPS_REPEATED))
        return last_s + (num_groups - GROUPS_SIMULATED) * repeated_s / GROUPS_REPEATED

    def _simulated_s(self, num_microbatches: int) -> float:
        pipeline = self.run.pipeline(num_microbatches)
        return simulate(pipeline, self.forward_s, self.backward_s, self.message_s).makespan_s

    def _by_chunk(self, seconds: Callable[[StageTraffic, Chunk], float]) -> list[list[float]]:
        return [[seconds(stage, chunk) for chunk in self.run.chunks] for stage in self.traffic]

    def _with_communication(self) -> tuple[Table, Table]:
        """Seconds of forwards and backwards, which share communication in proportion to compute."""
        both: tuple[list[list[float]], list[list[float]]] = ([], [])
        tables = *self.flops.seconds(self.options.assumed_tflops), self.tensor_s, self.context_s
        for rows in zip(*tables, strict=True):
            for table in both:
                table.append([])
            for *mine, tensor_s, context_s in zip(*rows, strict=True):
                for table, seconds in zip(both, mine, strict=True):
                    table[-1].append(seconds + (tensor_s + context_s) * seconds / sum(mine))
        return both

    def _tensor_s(self, stage: StageTraffic, chunk: Chunk) -> float:
        """Of one micro-batch; collectives are counted as multiples of the pass's hidden states."""
        once = stage.gathered_bytes(chunk.pass_.slots_per_token) * stage.tensor_share
        size = self.run.config.parallel.tensor_model_parallel_size
        return self._collectives_s(stage.tensor_bytes(chunk), once, self.ring_rate(1, size))

    def _context_s(self, stage: StageTraffic, chunk: Chunk) -> float:
        """Of one micro-batch: a collective for each gather and each scatter of keys and values."""
        parallel, once = self.run.config.parallel, stage.gathered_key_value_bytes(chunk.pass_)
        rate = self.ring_rate(parallel.tensor_model_parallel_size, parallel.context_parallel_size)
        return self._collectives_s(stage.context_bytes(chunk), once, rate)

    def _collectives_s(self, sent: int, bytes_of_one: float, rate: float) -> float:
        return sent / rate + sent / bytes_of_one * self._latency_s if sent else 0.0

    def _data_s(self, stage: StageTraffic) -> float:
        """What a step has to wait for gradients and weights of a stage."""
        parallel = self.run.config.parallel
        replicas = self.run.replicas * parallel.context_parallel_size
        embedding = stage.embedding_bytes()
        exposed_s = embedding / self._message_rate + self._latency_s if embedding else 0.0
        # Gradients of norms, which sequence parallelism sums over tensor-parallel ranks.
        norms = stage.replicated_gradient_bytes()
        exposed_s += norms / self.ring_rate(1, parallel.tensor_model_parallel_size)
        if replicas == 1:
            return exposed_s
        rate = self.ring_rate(parallel.tensor_model_parallel_size, replicas)
        sent_per_byte = stage.data_bytes() / (FP32_BYTES + stage.returned_bytes)
        latency_s = math.ceil(local_parameters(stage) / BUCKET_PARAMETERS) * self._latency_s
        first = [chunk.index for chunk in self.run.chunks if chunk.pass_.index == 0]
        for is_overlapped, table, parameter_bytes in (
            (parallel.overlap_grad_reduce, self.backward_s, FP32_BYTES),
            (parallel.overlap_param_gather, self.forward_s, stage.returned_bytes),
        ):
            seconds = sent_per_byte * parameter_bytes / rate + latency_s
            window_s = sum(table[stage.index][index] for index in first) if is_overlapped else 0.0
            exposed_s += max(seconds - window_s, 0.0)
        return exposed_s

    @property
    def message_s(self) -> float:
        """The largest message between stages."""
        slots = max(chunk.sent_per_token for chunk in self.run.chunks)
        return self.traffic[0].hidden_bytes(slots) / self._message_rate + self._latency_s

    @property
    def _latency_s(self) -> float:
        return self.options.message_latency_us * 1e-6

    @property
    def _message_rate(self) -> float:
        """Bytes per second from stage to stage; neighbours are in one node if all ranks are."""
        is_inside = self.run.world_size <= self.options.devices_per_node
        rate = self.options.nvlink_gb_per_s if is_inside else self.options.network_gb_per_s
        return rate * 1e9 * self.options.link_efficiency

    def ring_rate(self, stride: int, size: int) -> float:
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


def _with_selective_recompute(run: PlannedRun, flops: ChunkFlops) -> ChunkFlops:
    """Selective recompute as the FLOPs that would take its time; other work unchanged."""
    if run.config.training.recompute_granularity != "selective":
        return flops
    recomputed = [
        [
            SELECTIVE_SHARE * forward * (backward > 0)
            for forward, backward in zip(*rows, strict=True)
        ]
        for rows in zip(flops.forward, flops.backward, strict=True)
    ]
    return dataclasses.replace(flops, recomputed=recomputed)
