"""Floating-point operations of every chunk on every stage, and the seconds they would take.

Counted as in model/size.py, for one micro-batch on one rank: tensor- and context-parallel ranks
share a stage's work equally. A backward costs two forwards, and what it recomputes one more.
"""

import dataclasses

from megatron_ponder.model.size import forward_flops, layer_flops
from megatron_ponder.planning.run import PlannedRun
from megatron_ponder.planning.timeline import Table, Timeline, simulate

BACKWARD_PER_FORWARD = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkFlops:
    """FLOPs of one micro-batch on one rank, by stage and chunk."""

    forward: list[list[float]]
    backward: list[list[float]]
    """Without what is recomputed; 0 where there is no gradient."""
    recomputed: list[list[float]]
    """Forwards that the backward recomputes."""

    @property
    def recomputed_share(self) -> float:
        """Recomputed FLOPs over all others."""
        recomputed, others = (
            sum(map(sum, flops)) for flops in (self.recomputed, self.forward + self.backward)
        )
        return recomputed / others

    def seconds(self, tflops: float) -> tuple[Table, Table]:
        """Seconds of forwards and of backwards at a rate of `tflops` TFLOP/s."""
        rate = tflops * 1e12
        forward = [[flops / rate for flops in row] for row in self.forward]
        backward = [
            [sum(both) / rate for both in zip(*rows, strict=True)]
            for rows in zip(self.backward, self.recomputed, strict=True)
        ]
        return forward, backward


def simulate_step(run: PlannedRun, tflops: float, num_microbatches: int | None = None) -> Timeline:
    """One step on paper, timed by FLOPs.

    Args:
        run: the run.
        tflops: rate of a device in TFLOP/s.
        num_microbatches: of each data-parallel rank; None: those of the run.
    """
    return simulate(run.pipeline(num_microbatches), *chunk_flops(run).seconds(tflops))


def chunk_flops(run: PlannedRun) -> ChunkFlops:
    """Work of every chunk on every stage."""
    parallel, seq_length = run.config.parallel, run.config.data.seq_length
    sharing = parallel.tensor_model_parallel_size * parallel.context_parallel_size
    scale = run.config.training.micro_batch_size / sharing
    passes = forward_flops(run.config.model, run.plan, seq_length).passes
    ends = [flops.head + flops.mixture for flops in passes]
    inner, last = (
        [
            sum(layer_flops(run.config.model, pass_, seq_length, is_last_layer=is_last))
            for pass_ in run.plan.passes
        ]
        for is_last in (False, True)
    )
    forward: list[list[float]] = [[] for _ in run.stages]
    backward: list[list[float]] = [[] for _ in run.stages]
    recomputed: list[list[float]] = [[] for _ in run.stages]
    for stage in run.stages:
        for chunk in run.chunks:
            index, is_end = chunk.pass_.index, stage.ends_pass(chunk)
            layers = [inner[index]] * stage.layers_per_chunk
            if is_end:
                layers[-1] = last[index]
            whole = sum(layers) + (ends[index] if is_end else 0)
            units = stage.recomputed_units(chunk)
            twice = sum(layers[layer] for unit in units for layer in unit)
            if stage.recomputes_pass(chunk):
                twice = whole
            forward[stage.index].append(scale * whole)
            backward[stage.index].append(scale * BACKWARD_PER_FORWARD * whole * chunk.has_grad)
            recomputed[stage.index].append(scale * twice)
    return ChunkFlops(forward=forward, backward=backward, recomputed=recomputed)
