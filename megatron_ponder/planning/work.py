"""Floating-point operations of every chunk on every stage, and the seconds they would take.

Counted as in model/size.py, for one micro-batch on one rank: tensor- and context-parallel ranks
share a stage's work equally. A backward is two forwards, and what is recomputed one more.
"""

import dataclasses

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.model.size import PassFlops, forward_flops
from megatron_ponder.planning.shards import layers_by_stage
from megatron_ponder.planning.timeline import Table
from megatron_ponder.ponder.chunks import Chunk, cut_into_chunks
from megatron_ponder.ponder.plan import PassPlan

BACKWARD_PER_FORWARD = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkFlops:
    """FLOPs of one micro-batch on one rank, by stage and chunk."""

    forward: list[list[float]]
    backward: list[list[float]]
    """Without what is recomputed; 0 where there is no gradient."""
    recomputed: list[list[float]]
    """What the backward computes again."""

    @property
    def recomputed_share(self) -> float:
        """FLOPs computed again, of all others."""
        again, once = (
            sum(map(sum, flops)) for flops in (self.recomputed, self.forward + self.backward)
        )
        return again / once

    def seconds(self, tflops: float) -> tuple[Table, Table]:
        """Seconds of forwards and of backwards at a rate of `tflops` TFLOP/s."""
        rate = tflops * 1e12
        forward = [[flops / rate for flops in row] for row in self.forward]
        backward = [
            [(flops + again) / rate for flops, again in zip(row, repeated, strict=True)]
            for row, repeated in zip(self.backward, self.recomputed, strict=True)
        ]
        return forward, backward


def chunk_flops(config: ResolvedConfig, plan: PassPlan) -> ChunkFlops:
    """Work of every chunk on every stage.

    Args:
        config: resolved.
        plan: the passes.
    """
    parallel = config.parallel
    chunks = cut_into_chunks(plan, parallel.num_virtual_stages_per_pipeline_rank)
    sharing = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    scale = config.training.micro_batch_size / sharing
    # Every layer but the model's last does the same; a model of one layer has only the last.
    last, two = (_of_layers(config, plan, num_layers) for num_layers in (1, 2))
    forward: list[list[float]] = []
    backward: list[list[float]] = []
    recomputed: list[list[float]] = []
    for stage, layers in enumerate(layers_by_stage(config)):
        forward.append([])
        backward.append([])
        recomputed.append([])
        for chunk in chunks:
            at_end = last[chunk.pass_.index]
            inner = _layer(two[chunk.pass_.index]) - _layer(at_end)
            is_end = chunk.is_last_of_pass and stage == parallel.pipeline_model_parallel_size - 1
            by_layer = [float(inner)] * layers[chunk.layer_chunk]
            if is_end:
                by_layer[-1] = float(_layer(at_end))
            whole = sum(by_layer) + (at_end.head + at_end.mixture if is_end else 0)
            again = _recomputed(config, plan, chunk, by_layer, whole)
            forward[-1].append(scale * whole)
            backward[-1].append(scale * BACKWARD_PER_FORWARD * whole if chunk.has_grad else 0.0)
            recomputed[-1].append(scale * again if chunk.has_grad else 0.0)
    return ChunkFlops(forward=forward, backward=backward, recomputed=recomputed)


def _of_layers(config: ResolvedConfig, plan: PassPlan, num_layers: int) -> tuple[PassFlops, ...]:
    """FLOPs of the passes of a model with so many layers."""
    model = dataclasses.replace(config.model, num_layers=num_layers)
    return forward_flops(model, plan, config.data.seq_length).passes


def _layer(flops: PassFlops) -> int:
    """All but products with the vocabulary."""
    return flops.linear + flops.attention


def _recomputed(
    config: ResolvedConfig, plan: PassPlan, chunk: Chunk, by_layer: list[float], whole: float
) -> float:
    """What a chunk's backward computes again."""
    training = config.training
    if plan.is_recomputed(chunk.pass_, training):
        return whole
    if training.recompute_granularity != "full":
        return 0.0  # what selective recomputation makes again takes no products
    num = training.recompute_num_layers if training.recompute_method == "block" else None
    return sum(by_layer[:num])
