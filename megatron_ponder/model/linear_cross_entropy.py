"""The output layer fused with the cross entropy, in chunks of tokens.

    loss_t = log sum_v exp(h_t W_v) - h_t W_y(t)

The full logits are never materialised. For each chunk the forward computes the logits in the run's
dtype, reduces them to the statistics of `kernels.cross_entropy`, and drops them. The composed form
keeps logits in fp32 for the backward: tokens x vocabulary x 4 bytes, which is 3.1 GiB for 16384
tokens and 50304 rows, and twice that at the peak.

The backward recomputes the head matmul of each chunk. Implementations that reduce the loss to one
number compute gradients in the forward instead. That does not work here: the weight gradient needs
the gradient of each token's loss, which masks and micro-batches determine only in the backward. The
price is one more matmul with the vocabulary, four instead of three: 0.8% of the FLOPs of a training
step of a 410M Llama and 0.4% of a 1.4B's (ponderlm2, K = 1, R = 2).

The vocabulary may be sharded over tensor-parallel ranks. They reduce the maxima, then the sums of
exponentials and the labels' logits, once for all chunks. Under sequence parallelism hidden states
are gathered in the forward and again in the backward, as in the output layer. Padded columns do not
enter. Weight gradients of several chunks are accumulated in fp32.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_ponder.kernels.cross_entropy import logits_gradient_, row_statistics_
from megatron_ponder.kernels.weight_gradient import add_weight_gradient

MAX_CHUNK_BYTES = 256 * 2**20
"""Size of a chunk's logits unless the caller sets the number of tokens. Each chunk reads and writes
the weight gradient once, so small chunks cost time."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    tp_group: ProcessGroup,
    sequence_parallel: bool,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Cross entropy of each token.

    Args:
        hidden: normed, [s, b, h]; under sequence parallelism this rank's [s / tp, b, h].
        weight: this rank's rows of the output layer, [v / tp, h].
        labels: int64 [s, b], ids in the whole vocabulary.
        vocab_size: rows that are no padding, over all ranks.
        tp_group: the ranks that share the vocabulary.
        sequence_parallel: whether each rank has only its part of the tokens.
        chunk_tokens: tokens in a chunk; None: as many as fill `MAX_CHUNK_BYTES`.

    Returns:
        fp32 [s, b].
    """
    if chunk_tokens is None:
        chunk_tokens = default_chunk_tokens(weight.size(0), hidden.element_size())
    shard = _Shard(vocab_size, weight.size(0), tp_group, sequence_parallel, chunk_tokens)
    losses: Tensor = _LinearCrossEntropy.apply(hidden, weight, labels, shard)  # type: ignore[no-untyped-call]
    return losses


def default_chunk_tokens(num_rows: int, element_bytes: int) -> int:
    """Tokens in a chunk whose logits take `MAX_CHUNK_BYTES`, at least 1.

    Args:
        num_rows: of the output layer on this rank.
        element_bytes: of a logit.
    """
    return max(1, MAX_CHUNK_BYTES // (num_rows * element_bytes))


class _Shard:
    """The part of vocabulary and tokens on a rank."""

    def __init__(
        self,
        vocab_size: int,
        num_rows: int,
        group: ProcessGroup,
        is_scattered: bool,
        chunk_tokens: int,
    ) -> None:
        self.group = group
        self.is_shared = group.size() > 1
        self.is_scattered = is_scattered and self.is_shared
        self.first_row = num_rows * group.rank()
        self.num_real_rows = min(max(vocab_size - self.first_row, 0), num_rows)
        self.chunk_tokens = chunk_tokens

    def gather(self, hidden: Tensor) -> Tensor:
        """Hidden states of all tokens as rows: [s (/ tp), b, h] -> [s * b, h]."""
        if self.is_scattered:
            shape = (hidden.size(0) * self.group.size(), *hidden.shape[1:])
            whole = hidden.new_empty(shape)
            dist.all_gather_into_tensor(whole, hidden.contiguous(), group=self.group)
            hidden = whole
        return hidden.reshape(-1, hidden.size(-1))

    def sum_and_scatter(self, gradient: Tensor, like: Tensor) -> Tensor:
        """Sum the ranks' gradients of all rows; return the rows of this rank."""
        if self.is_scattered:
            mine = torch.empty_like(like, memory_format=torch.contiguous_format)
            dist.reduce_scatter_tensor(mine.view(-1, mine.size(-1)), gradient, group=self.group)
            return mine
        if self.is_shared:
            dist.all_reduce(gradient, group=self.group)
        return gradient.view(like.shape)

    def chunks(self, *by_row: Tensor) -> Any:
        """Tensors with one row per token, split into chunks."""
        return zip(*(tensor.split(self.chunk_tokens) for tensor in by_row), strict=True)


class _LinearCrossEntropy(torch.autograd.Function):
    """See the module."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, shard: _Shard) -> Tensor:
        rows = shard.gather(hidden)
        columns = labels.reshape(-1) - shard.first_row
        statistics = torch.cat(
            [
                row_statistics_(part @ weight.t(), columns_, shard.num_real_rows)
                for part, columns_ in shard.chunks(rows, columns)
            ],
            dim=1,
        )
        largest, total, target = statistics
        if shard.is_shared:
            mine = largest.clone()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=shard.group)
            total.mul_((mine - largest).exp_())
            dist.all_reduce(statistics[1:], group=shard.group)
        log_total = total.log()
        ctx.save_for_backward(hidden, weight, columns, largest + log_total)
        ctx.shard = shard
        losses: Tensor = log_total - (target - largest)
        return losses.view(labels.shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, columns, log_sum = ctx.saved_tensors
        shard: _Shard = ctx.shard
        gradients = grad_outputs[0].float().reshape(-1)
        rows = shard.gather(hidden)
        d_rows = torch.empty_like(rows)
        # A single chunk's weight gradient is final and needs no fp32 accumulator.
        is_one_chunk = rows.size(0) <= shard.chunk_tokens
        dtype = weight.dtype if is_one_chunk else torch.float32
        d_weight = torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None
        for part, columns_, log_sum_, gradient, d_part in shard.chunks(
            rows, columns, log_sum, gradients, d_rows
        ):
            d_logits = logits_gradient_(
                part @ weight.t(), columns_, log_sum_, gradient, shard.num_real_rows
            )
            torch.mm(d_logits, weight, out=d_part)
            if d_weight is not None:
                add_weight_gradient(d_weight, d_logits, part)
            del d_logits  # before the next chunk's are made
        d_hidden = shard.sum_and_scatter(d_rows, hidden)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None
