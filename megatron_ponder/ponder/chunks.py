"""A pass plan cut for a pipeline: every pass becomes one or more virtual pipeline chunks.

A pipeline stage (a rank) holds `v` chunks of layers, usually one. megatron-core's interleaved
schedule sends what the last stage made of chunk c to the first stage as the input of chunk c+1;
so if chunk c is a pass instead of another set of layers, the schedule runs passes:

    chunk c = pass c // v through layer chunk c % v of every stage

All chunks with the same layer chunk share one set of weights. The list of chunks says all that has
to be known before anything is sent: how many slots per token travel between the stages of a chunk
and on to the next chunk, and which of them get a gradient back. It is pure arithmetic; the
schedule, the communicator, the timeline and the memory accounting read the same list.
"""

import dataclasses
from collections.abc import Sequence

from megatron_ponder.ponder.plan import Pass, PassPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """One pass through one chunk of layers on every pipeline stage."""

    index: int
    """Position in the schedule, from 0."""
    pass_: Pass
    """The pass that runs."""
    layer_chunk: int
    """Which of each stage's layer chunks it runs through, from 0."""
    is_last_of_pass: bool
    """Whether the last stage ends the pass: final norm, then the carry or the loss."""
    has_grad: bool
    """Whether the backward goes through it."""

    @property
    def sent_per_token(self) -> int:
        """Vectors per token sent from one pipeline stage to the next within the chunk."""
        return self.pass_.sent_per_token

    @property
    def handed_on_per_token(self) -> int:
        """Vectors per token that the last pipeline stage sends to the first for the next chunk."""
        if self.is_last_of_pass:
            return self.pass_.outputs_per_token
        return self.pass_.sent_per_token


def cut_into_chunks(plan: PassPlan, num_layer_chunks: int = 1) -> tuple[Chunk, ...]:
    """The chunks of a forward in the order in which they depend on each other.

    Args:
        plan: the passes.
        num_layer_chunks: v, layer chunks on each stage.
    """
    return tuple(
        Chunk(
            index=pass_.index * num_layer_chunks + layer_chunk,
            pass_=pass_,
            layer_chunk=layer_chunk,
            is_last_of_pass=layer_chunk == num_layer_chunks - 1,
            has_grad=plan.has_grad(pass_),
        )
        for pass_ in plan.passes
        for layer_chunk in range(num_layer_chunks)
    )


def activation_sent(chunks: Sequence[Chunk], chunk: Chunk, *, is_last_stage: bool) -> int:
    """Vectors per token that a stage sends after the forward of a chunk; 0: nothing.

    The last stage sends to the first, for the next chunk.

    Args:
        chunks: of the whole plan.
        chunk: the chunk that has just run.
        is_last_stage: whether the stage is the last.
    """
    if not is_last_stage:
        return chunk.sent_per_token
    return 0 if chunk is chunks[-1] else chunk.handed_on_per_token


def gradient_sent(chunks: Sequence[Chunk], chunk: Chunk, *, is_first_stage: bool) -> int:
    """Vectors per token that a stage sends after the backward of a chunk; 0: nothing.

    The first stage sends to the last, for the chunk before.

    Args:
        chunks: of the whole plan.
        chunk: the chunk whose backward is due.
        is_first_stage: whether the stage is the first.
    """
    if not is_first_stage:
        return chunk.sent_per_token if chunk.has_grad else 0
    if chunk.index == 0 or not chunks[chunk.index - 1].has_grad:
        return 0
    return chunks[chunk.index - 1].handed_on_per_token


def max_sends_kept(num_pipeline_stages: int, num_chunks: int) -> int:
    """Messages of one direction that a stage may have on the way.

    A stage is at most as many chunks of micro-batches ahead of its backward as megatron-core's
    first stage has in its warm-up, 2 (p - 1) + (chunks - 1) p, and one. A message further back has
    been received: without it the neighbour could not have sent what has come since.
    """
    return 2 * (num_pipeline_stages - 1) + (num_chunks - 1) * num_pipeline_stages + 1
