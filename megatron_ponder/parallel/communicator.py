"""What travels between pipeline stages, with shapes that everybody knows from the plan.

megatron-core's schedule asks for a message without knowing its length, which differs between passes
here, and its own way of sending lengths first mismatches them where two stages are both neighbours
of each other. Nothing has to be asked: a stage's messages arrive in the order in which its
neighbour computes them, and that order and every length follow from the chunks.

Activations and gradients travel in process groups of their own, so that each is in order. Only
receives are waited for at once. A send is kept until the schedule cannot have come this far without
its arrival: waiting for it earlier would deadlock where two stages send to each other, as gloo ends
a send when it is received.
"""

import collections
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ponder.ponder.chunks import (
    Chunk,
    activation_sent,
    gradient_sent,
    max_sends_kept,
)
from megatron_ponder.runtime.distributed import backward_pipeline_group, process_groups

Lengths = Iterator[int | None]
"""Slots per token of the messages to come; None for one that is never sent."""
Sends = collections.deque[tuple[dist.Work, Tensor]]
"""Messages on their way, oldest first."""


class PassCommunicator(P2PCommunicator):
    """Sends and receives for one step of one plan.

    Args:
        config: the schedule's.
        chunks: all chunks of the plan.
        num_microbatches: of the step.
        num_tokens_local: tokens of which a rank has the slots.
        micro_batch_size: sequences in a micro-batch.
        forward_only: whether there is no backward.
    """

    def __init__(
        self,
        config: TransformerConfig,
        chunks: Sequence[Chunk],
        *,
        num_microbatches: int,
        num_tokens_local: int,
        micro_batch_size: int,
        forward_only: bool,
    ) -> None:
        super().__init__(pp_group=process_groups().pp, config=config)
        stage, num_pipeline_stages = self.pp_group.rank(), self.pp_group.size()
        table = get_schedule_table(num_microbatches, len(chunks), num_pipeline_stages)
        order = [chunks[chunk] for _, chunk in table]
        self._activation_lengths = _activation_lengths(order, chunks, is_first=stage == 0)
        self._gradient_lengths = _gradient_lengths(
            [] if forward_only else order, chunks, is_last=stage == num_pipeline_stages - 1
        )
        self._num_tokens_local = num_tokens_local
        self._micro_batch_size = micro_batch_size
        self._max_sends = max_sends_kept(num_pipeline_stages, len(chunks))
        self._sent_activations: Sends = collections.deque()
        self._sent_gradients: Sends = collections.deque()

    def finish(self) -> None:
        """Wait until everything sent has arrived, and check that everything expected has come."""
        for sends in (self._sent_activations, self._sent_gradients):
            while sends:
                sends.popleft()[0].wait()
        left = sum(length is not None for length in self._activation_lengths)
        left += sum(length is not None for length in self._gradient_lengths)
        assert left == 0, f"{left} messages of the plan were never received"

    def _communicate(  # type: ignore[no-untyped-def]
        self,
        *,
        tensor_send_next: Tensor | None,
        tensor_send_prev: Tensor | None,
        recv_prev: bool,
        recv_next: bool,
        tensor_shape: object,
        wait_on_reqs: bool = True,
    ):
        """Replaces P2PCommunicator's of the same name; `tensor_shape` is ignored.

        Returns:
            The received activation and gradient, None where there is none; and where receives are
            not waited for, a handle for each that was asked for, by megatron-core's names.
        """
        activation, activation_handle = self._exchange(
            tensor_send_next,
            self.next_rank,
            self._empty(next(self._activation_lengths)) if recv_prev else None,
            self.prev_rank,
            self.pp_group,
            self._sent_activations,
        )
        gradient, gradient_handle = self._exchange(
            tensor_send_prev,
            self.prev_rank,
            self._empty(next(self._gradient_lengths)) if recv_next else None,
            self.next_rank,
            backward_pipeline_group(),
            self._sent_gradients,
        )
        if wait_on_reqs:
            activation_handle.wait()
            gradient_handle.wait()
            return activation, gradient, None
        handles: dict[str, _Handle] = {}
        if recv_prev:
            handles["recv_prev"] = activation_handle
        if recv_next:
            handles["recv_next"] = gradient_handle
        return activation, gradient, handles

    def _exchange(
        self,
        sent: Tensor | None,
        to_rank: int | None,
        received: Tensor | None,
        from_rank: int | None,
        group: dist.ProcessGroup,
        sends: Sends,
    ) -> tuple[Tensor | None, "_Handle"]:
        """One direction: send to one neighbour and receive from the other, together."""
        ops = []
        if sent is not None:
            sent = sent.detach().contiguous()
            ops.append(dist.P2POp(dist.isend, sent, to_rank, group))
        if received is not None:
            ops.append(dist.P2POp(dist.irecv, received.detach(), from_rank, group))
        works = dist.batch_isend_irecv(ops) if ops else []
        # nccl gives one handle for the batch, gloo one for each operation in order.
        if sent is not None:
            sends.append((works[0], sent))
            if len(sends) > self._max_sends:
                sends.popleft()[0].wait()
        return received, _Handle(works[-1] if received is not None else None)

    def _empty(self, slots_per_token: int | None) -> Tensor | None:
        """A tensor for a message of so many slots per token; None for one that is not sent."""
        if slots_per_token is None:
            return None
        return torch.empty(
            self._num_tokens_local * slots_per_token,
            self._micro_batch_size,
            self.config.hidden_size,
            dtype=self.config.pipeline_dtype,
            device=torch.cuda.current_device(),
            requires_grad=True,
        )


class _Handle:
    """What the schedule waits on before it uses what was received."""

    def __init__(self, work: dist.Work | None) -> None:
        self._work = work

    def wait(self) -> None:
        """Wait for the message; nothing if there is none."""
        if self._work is not None:
            self._work.wait()


def _activation_lengths(
    order: Sequence[Chunk], chunks: Sequence[Chunk], *, is_first: bool
) -> Lengths:
    """Of the activations that a stage receives, in order.

    The first stage receives what the last one hands on from each chunk but the last.
    """
    producers = [c for c in order if not is_first or c is not chunks[-1]]
    return iter([activation_sent(chunks, c, is_last_stage=is_first) for c in producers])


def _gradient_lengths(order: Sequence[Chunk], chunks: Sequence[Chunk], *, is_last: bool) -> Lengths:
    """Of the gradients that a stage receives, in order; the backward takes chunks from the last.

    The last stage receives, from the first, the gradient of what it handed on to each chunk.
    """
    senders = [chunks[-1 - c.index] for c in order]
    senders = [c for c in senders if not is_last or c.index > 0]
    return iter([gradient_sent(chunks, c, is_first_stage=is_last) or None for c in senders])
