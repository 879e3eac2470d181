"""The order in which each pipeline stage works: megatron-core's schedules as data.

A stage runs one instruction after the other: it computes the forward or backward of a micro-batch
through a chunk, sends the result, or waits for the input of the next computation. The instructions
are those of megatron-core 0.16's schedules (tests compare them with `get_schedule_table`,
`get_pp_rank_microbatches` and recordings of the schedules):

    one chunk, several stages    forward_backward_pipelining_without_interleaving (1F1B)
    several chunks and stages    forward_backward_pipelining_with_interleaving, groups of p
    one stage                    forward_backward_no_pipelining

In the interleaved schedule without overlapped communication a stage sends after a forward and the
backward that follows it, and then waits for the inputs of the next two. Otherwise it sends at once
and waits as late as possible. Left out: how long anything takes (timeline.py).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from megatron_ponder.errors import ConfigError


class Work(NamedTuple):
    """The forward or backward of one micro-batch through one chunk on one stage."""

    is_backward: bool
    chunk: int
    """Chunk of the plan, from 0."""
    microbatch: int
    """Micro-batch of the step, from 0."""


class Instruction(NamedTuple):
    """One step of a stage."""

    action: Literal["compute", "send", "wait"]
    """Compute it, send its result, or wait for its input."""
    work: Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """The numbers that determine the order.

    Raises:
        ConfigError: megatron-core's interleaved schedule cannot run these.
    """

    num_pipeline_stages: int
    """p, pipeline ranks."""
    num_chunks: int
    """Passes times layer chunks of a rank."""
    num_microbatches: int
    """m, micro-batches of a step on each data-parallel rank."""
    first_grad_chunk: int = 0
    """Chunks before this one have no backward."""
    overlap: bool = False
    """Whether stages compute while tensors travel."""
    forward_only: bool = False
    """Evaluation."""

    def __post_init__(self) -> None:
        """Check what the schedules require."""
        assert self.num_pipeline_stages >= 1 and self.num_chunks >= 1 and self.num_microbatches >= 1
        assert 0 <= self.first_grad_chunk < self.num_chunks
        if self.is_interleaved and self.num_microbatches % self.num_pipeline_stages:
            raise ConfigError(
                f"{self.num_microbatches} micro-batches on {self.num_pipeline_stages} pipeline "
                f"stages: several chunks need a multiple of {self.num_pipeline_stages}."
            )

    @property
    def is_interleaved(self) -> bool:
        """Whether the interleaved schedule runs."""
        return self.num_pipeline_stages > 1 and self.num_chunks > 1

    def source(self, stage: int, work: Work) -> tuple[int, Work] | None:
        """The other stage and its work whose result `work` on `stage` needs; None: no other.

        The last stage's output of a chunk is the first stage's input of the next.
        """
        last_stage, last_chunk = self.num_pipeline_stages - 1, self.num_chunks - 1
        if not work.is_backward:
            if stage > 0:
                return stage - 1, work
            if work.chunk > 0:
                return last_stage, work._replace(chunk=work.chunk - 1)
            return None
        if work.chunk < self.first_grad_chunk:
            return None
        if stage < last_stage:
            return stage + 1, work
        if work.chunk < last_chunk:
            return 0, work._replace(chunk=work.chunk + 1)
        return None

    def num_warmup(self, stage: int) -> int:
        """Forwards of a stage before its first backward."""
        total = self.num_microbatches * self.num_chunks
        if self.forward_only:
            return total
        if self.num_pipeline_stages == 1:
            return self.num_chunks
        behind = self.num_pipeline_stages - stage - 1
        if self.is_interleaved:
            return min(total, behind * 2 + (self.num_chunks - 1) * self.num_pipeline_stages)
        return min(total, behind)

    @functools.cached_property
    def forwards(self) -> list[Work]:
        """Forwards in the order in which every stage runs them."""
        group = self.num_pipeline_stages if self.is_interleaved else 1
        return [
            Work(is_backward=False, chunk=chunk, microbatch=microbatch)
            for first in range(0, self.num_microbatches, group)
            for chunk in range(self.num_chunks)
            for microbatch in range(first, min(first + group, self.num_microbatches))
        ]

    @functools.cached_property
    def backwards(self) -> list[Work]:
        """Backwards in the order in which every stage runs them, chunks from the last."""
        return [
            work._replace(is_backward=True, chunk=self.num_chunks - 1 - work.chunk)
            for work in self.forwards
        ]

    def order(self, stage: int) -> list[Work]:
        """Everything a stage computes in one step, in order."""
        return [step.work for step in self.instructions(stage) if step.action == "compute"]

    def instructions(self, stage: int) -> list[Instruction]:
        """What a stage does in one step."""
        forwards, backwards = self.forwards, self.backwards
        if self.forward_only:
            return list(_one_by_one(forwards))
        if self.num_pipeline_stages == 1:
            in_turns = [
                work
                for first in range(0, len(forwards), self.num_chunks)
                for half in (forwards, backwards)
                for work in half[first : first + self.num_chunks]
            ]
            return list(_one_by_one(in_turns))
        num_warmup = self.num_warmup(stage)
        warmup, rest = forwards[:num_warmup], forwards[num_warmup:]
        steady = list(zip(rest, backwards, strict=False))
        cooldown = backwards[len(steady) :]
        if self.overlap or not self.is_interleaved:
            in_order = [work for pair in steady for work in pair]
            return list(_one_by_one([*warmup, *in_order, *cooldown]))
        return list(_in_pairs(warmup, steady, cooldown))


def _one_by_one(works: Sequence[Work]) -> Iterator[Instruction]:
    """Wait, compute, send: overlapped communication, and 1F1B."""
    for work in works:
        yield Instruction(action="wait", work=work)
        yield Instruction(action="compute", work=work)
        yield Instruction(action="send", work=work)


def _in_pairs(
    warmup: list[Work], steady: list[tuple[Work, Work]], cooldown: list[Work]
) -> Iterator[Instruction]:
    """The interleaved schedule without overlap: one exchange after each forward and backward.

    The inputs of a forward and of the backward after it are received together, before the forward.
    """
    yield from _one_by_one(warmup)
    for forward, backward in steady:
        yield Instruction(action="wait", work=forward)
        yield Instruction(action="wait", work=backward)
        yield Instruction(action="compute", work=forward)
        yield Instruction(action="compute", work=backward)
        yield Instruction(action="send", work=forward)
        yield Instruction(action="send", work=backward)
    yield from _one_by_one(cooldown)
