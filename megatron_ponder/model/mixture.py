"""The mixture of embeddings by predicted probabilities, with the vocabulary sharded over ranks.

    mixture = sum over v of softmax(logits)_v E_v

Each tensor-parallel rank has the logits and the embeddings of its part of the vocabulary. The ranks
reduce the maxima and sums of the softmax, then the partial mixtures. With `top_k` only the largest
k logits of the whole vocabulary enter, and all that equal the k-th, so that the result does not
depend on which rank has them.

The backward keeps one row of the local vocabulary per slot, and no other tensor of that size.
Context-parallel ranks need no communication here.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def mix_embeddings(
    logits: Tensor,
    embeddings: Tensor,
    tp_group: ProcessGroup,
    *,
    sequence_parallel: bool,
    top_k: int | None,
) -> Tensor:
    """The mixture at every slot; gradients are exact on every layout.

    Args:
        logits: [slots, b, v / tp], this rank's columns; minus infinity in padded ones.
        embeddings: [v / tp, h], the rows of the same part of the vocabulary, not scaled.
        tp_group: the ranks that share the vocabulary.
        sequence_parallel: whether each rank receives only its part of the slots.
        top_k: how many logits enter; None: all.

    Returns:
        [slots, b, h], or this rank's contiguous [slots / tp, b, h].
    """
    mixture: Tensor = _Mixture.apply(logits, embeddings, tp_group, sequence_parallel, top_k)  # type: ignore[no-untyped-call]
    return mixture


class _Mixture(torch.autograd.Function):
    """The module's formula and its gradients, with g = d loss / d mixture.

    d E_v = sum over slots of p_v g;    d logits_v = p_v (g E_v - g mixture)
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        embeddings: Tensor,
        group: ProcessGroup,
        is_scattered: bool,
        top_k: int | None,
    ) -> Tensor:
        probabilities = _softmax(logits, group, top_k).to(embeddings.dtype)
        mixture = torch.matmul(probabilities, embeddings)
        if is_scattered:
            scattered = mixture.new_empty(mixture.size(0) // group.size(), *mixture.shape[1:])
            dist.reduce_scatter_tensor(scattered, mixture, group=group)
            mixture = scattered
        elif group.size() > 1:
            dist.all_reduce(mixture, group=group)
        ctx.save_for_backward(probabilities, embeddings, mixture)
        ctx.group, ctx.is_scattered = group, is_scattered
        return mixture

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        probabilities, embeddings, mixture = ctx.saved_tensors
        (grad,) = grad_outputs
        grad = grad.contiguous()
        inner = (grad.float() * mixture.float()).sum(dim=-1, keepdim=True)
        if ctx.is_scattered:
            grad, inner = _gather(grad, ctx.group), _gather(inner, ctx.group)
        # [slots, b, ...] -> [slots * b, ...]
        rows, probability_rows = grad.flatten(0, 1), probabilities.flatten(0, 1)
        d_embeddings = torch.matmul(probability_rows.t(), rows)
        d_logits = torch.matmul(rows, embeddings.t())
        d_logits.sub_(inner.flatten(0, 1)).mul_(probability_rows)
        return d_logits.view(probabilities.shape), d_embeddings, None, None, None


def _softmax(logits: Tensor, group: ProcessGroup, top_k: int | None) -> Tensor:
    """This rank's columns of the softmax over all of them, fp32 [slots, b, v / tp]."""
    smallest = None if top_k is None else _kth_largest(logits, top_k, group)
    largest = logits.amax(dim=-1, keepdim=True).float()
    if group.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    weights = (logits.float() - largest).exp_()
    if smallest is not None:
        weights.masked_fill_(logits < smallest, 0.0)
    total = weights.sum(dim=-1, keepdim=True)
    if group.size() > 1:
        dist.all_reduce(total, group=group)
    return weights.div_(total)


def _kth_largest(logits: Tensor, k: int, group: ProcessGroup) -> Tensor:
    """The k-th largest logit of all ranks' columns, [slots, b, 1]; the smallest if there are fewer.

    The k largest of all are among the k largest of each rank.
    """
    candidates = logits.topk(min(k, logits.size(-1)), dim=-1).values
    if group.size() > 1:
        by_rank = [torch.empty_like(candidates) for _ in range(group.size())]
        dist.all_gather(by_rank, candidates.contiguous(), group=group)
        candidates = torch.cat(by_rank, dim=-1)
    return candidates.topk(min(k, candidates.size(-1)), dim=-1).values[..., -1:]


def _gather(shard: Tensor, group: ProcessGroup) -> Tensor:
    """Gather the slots of all ranks: [slots / tp, ...] -> [slots, ...]."""
    whole = shard.new_empty(shard.size(0) * group.size(), *shard.shape[1:])
    dist.all_gather_into_tensor(whole, shard, group=group)
    return whole
