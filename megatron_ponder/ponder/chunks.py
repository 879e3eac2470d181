"""Splits a pass plan into chunks for a pipeline: every pass becomes one or more virtual chunks.

A pipeline stage (a rank) has `v` layer chunks, usually one. In megatron-core's interleaved
schedule, the last stage sends its output of chunk c to the first stage, as the input of chunk c+1.
If chunk c is a pass instead of another set of layers, the schedule runs passes:

    chunk c = pass c // v through layer chunk c % v of every stage

All chunks with the same layer chunk share one set of weights. The list of chunks determines every
message before anything is sent: how many vectors per token are sent between the stages of a chunk
and to the next chunk, and which of them have a gradient. It is pure arithmetic. The schedule, the
communicator, the timeline and the memory accounting all use the same list.
"""

import dataclasses
from collections.abc import Sequence

from megatron_ponder.ponder.plan import Pass, PassPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """One pass through one chunk of layers on every pipeline stage."""

    index: int
    """Position in the forward, from 0."""
    pass_: Pass
    """The pass that runs."""
    layer_chunk: int
    """Index of the layer chunk that it runs on each stage, from 0."""
    is_last_of_pass: bool
    """Whether the last stage ends the pass: final norm, then the carry or the loss."""
    has_grad: bool
    """Whether the backward includes this chunk."""

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
    """Split a forward into chunks, in the order in which each depends on the one before.

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
        chunks: all chunks of the plan.
        chunk: the chunk that has just run.
        is_last_stage: whether the sender is the last stage.
    """
    if not is_last_stage:
        return chunk.sent_per_token
    return 0 if chunk is chunks[-1] else chunk.handed_on_per_token


def gradient_sent(chunks: Sequence[Chunk], chunk: Chunk, *, is_first_stage: bool) -> int:
    """Vectors per token that a stage sends after the backward of a chunk; 0: nothing.

    The first stage sends to the last, for the previous chunk.

    Args:
        chunks: all chunks of the plan.
        chunk: the chunk whose backward has just run.
        is_first_stage: whether the sender is the first stage.
    """
    if not is_first_stage:
        return chunk.sent_per_token if chunk.has_grad else 0
    if chunk.index == 0 or not chunks[chunk.index - 1].has_grad:
        return 0
    return chunks[chunk.index - 1].handed_on_per_token


def max_sends_kept(num_pipeline_stages: int, num_chunks: int) -> int:
    """Upper bound on the sends of one direction that may not have been received yet.

    A stage has run at most 2 (p - 1) + (chunks - 1) p + 1 forwards (one chunk of one micro-batch
    each) whose backward is still due: the warm-up of megatron-core's first stage, plus one. Any
    older message has been received, because the neighbour needed it to send what this stage has
    received since.
    """
    return 2 * (num_pipeline_stages - 1) + (num_chunks - 1) * num_pipeline_stages + 1
