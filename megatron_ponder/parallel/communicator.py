"""Point-to-point communication between pipeline stages, with message shapes known from the plan.

The length of a message differs between passes, and megatron-core's schedule does not know it when
it requests a receive. megatron-core can send the lengths first, but with two stages, where the
previous and the next rank are the same, it mismatches them. We need no such exchange. A stage
receives messages in the order in which its neighbour computes them, and the list of chunks
determines this order and every length.

Activations and gradients use separate process groups, so each kind arrives in order. A receive is
waited for when its message is needed. A send is kept, and waited for only once the schedule
guarantees that it has been received. Waiting earlier would deadlock if two stages send to each
other, because a gloo send does not complete until it is received.
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
"""Vectors per token of each expected message, in order; None for a message that is never sent."""
Sends = collections.deque[tuple[dist.Work, Tensor]]
"""Sends that are not known to be complete, oldest first."""


class PassCommunicator(P2PCommunicator):
    """Sends and receives for one step of one plan.

    Args:
        config: the config of the schedule.
        chunks: all chunks of the plan.
        num_microbatches: micro-batches of the step.
        num_tokens_local: tokens whose slots are on this rank.
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
        """Wait for all sends to complete, and check that every expected message was received."""
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
        """Override P2PCommunicator's method; `tensor_shape` is ignored.

        Returns:
            The received activation and the received gradient, each None if there is none. Third,
            None if `wait_on_reqs`; otherwise one handle per requested receive, under
            megatron-core's names.
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
        """Send to one neighbour and receive from the other in one batch, in one direction."""
        ops = []
        if sent is not None:
            sent = sent.detach().contiguous()
            ops.append(dist.P2POp(dist.isend, sent, to_rank, group))
        if received is not None:
            ops.append(dist.P2POp(dist.irecv, received.detach(), from_rank, group))
        works = dist.batch_isend_irecv(ops) if ops else []
        # nccl returns one handle for the batch; gloo returns one per operation, in order.
        if sent is not None:
            sends.append((works[0], sent))
            if len(sends) > self._max_sends:
                sends.popleft()[0].wait()
        return received, _Handle(works[-1] if received is not None else None)

    def _empty(self, slots_per_token: int | None) -> Tensor | None:
        """Buffer for a message with this many slots per token; None if the message is not sent."""
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
    """The schedule waits on this before it uses a received tensor."""

    def __init__(self, work: dist.Work | None) -> None:
        self._work = work

    def wait(self) -> None:
        """Wait for the message, if there is one."""
        if self._work is not None:
            self._work.wait()


def _activation_lengths(
    order: Sequence[Chunk], chunks: Sequence[Chunk], *, is_first: bool
) -> Lengths:
    """Lengths of the activations that a stage receives, in order.

    The first stage receives the output of each chunk but the last from the last stage.
    """
    producers = [c for c in order if not is_first or c is not chunks[-1]]
    return iter([activation_sent(chunks, c, is_last_stage=is_first) for c in producers])


def _gradient_lengths(order: Sequence[Chunk], chunks: Sequence[Chunk], *, is_last: bool) -> Lengths:
    """Lengths of the gradients that a stage receives, in order: the backward reverses the chunks.

    The last stage receives, from the first stage, the gradient of the input of each chunk but the
    first.
    """
    senders = [chunks[-1 - c.index] for c in order]
    senders = [c for c in senders if not is_last or c.index > 0]
    return iter([gradient_sent(chunks, c, is_first_stage=is_last) or None for c in senders])
