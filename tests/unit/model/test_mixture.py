"""Mixtures of embeddings against softmax and a product, forward and backward, on 1 and 2 ranks."""

import pytest
import torch
import torch.distributed as dist

from megatron_ponder.model.mixture import mix_embeddings
from tests.ranks import run_ranks

SLOTS, BATCH, VOCAB, REAL, HIDDEN = 6, 2, 12, 11, 5


def inputs():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(SLOTS, BATCH, VOCAB, generator=generator)
    logits[..., REAL:] = float("-inf")
    embeddings = torch.randn(VOCAB, HIDDEN, generator=generator)
    weights = torch.randn(SLOTS, BATCH, HIDDEN, generator=generator)
    return logits, embeddings, weights


def expected(top_k):
    """By autograd; with top_k in the form of the authors' code."""
    logits, embeddings, weights = inputs()
    logits.requires_grad_()
    embeddings.requires_grad_()
    if top_k is None:
        mixture = torch.softmax(logits, dim=-1) @ embeddings
    else:
        best = logits.topk(min(top_k, REAL), dim=-1)
        chosen = torch.softmax(best.values, dim=-1).unsqueeze(-1) * embeddings[best.indices]
        mixture = chosen.sum(dim=-2)
    (mixture * weights).sum().backward()
    return mixture.detach(), logits.grad, embeddings.grad


def measured(top_k, sequence_parallel):
    """The same on this rank's columns; a rank's loss is of its own slots."""
    group = dist.group.WORLD
    rank, size = group.rank(), group.size()
    logits, embeddings, weights = inputs()
    logits = logits.chunk(size, dim=-1)[rank].clone().requires_grad_()
    embeddings = embeddings.chunk(size)[rank].clone().requires_grad_()
    mixture = mix_embeddings(
        logits, embeddings, group, sequence_parallel=sequence_parallel, top_k=top_k
    )
    mine = weights.chunk(size)[rank] if sequence_parallel else weights
    (mixture * mine).sum().backward()
    return mixture.detach(), logits.grad, embeddings.grad


@pytest.mark.parametrize("top_k", [None, 1, 4, 100])
@pytest.mark.parametrize(("num_ranks", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_equals_softmax_times_embeddings(top_k, num_ranks, sequence_parallel):
    mixture, d_logits, d_embeddings = expected(top_k)
    by_rank = run_ranks(measured, num_ranks, top_k, sequence_parallel)
    for rank, (mine, my_logits, my_embeddings) in enumerate(by_rank):
        slots = mixture.chunk(num_ranks)[rank] if sequence_parallel else mixture
        torch.testing.assert_close(mine, slots)
        columns = d_logits.nan_to_num().chunk(num_ranks, dim=-1)[rank]
        torch.testing.assert_close(my_logits, columns)
        torch.testing.assert_close(my_embeddings, d_embeddings.chunk(num_ranks)[rank])


def equal_logits(top_k):
    """All probabilities are alike, so that no rank can be preferred."""
    group = dist.group.WORLD
    embeddings = torch.arange(8.0)[:, None].chunk(group.size())[group.rank()]
    logits = torch.zeros(1, 1, 8 // group.size())
    return mix_embeddings(logits, embeddings, group, sequence_parallel=False, top_k=top_k)


def test_ties_do_not_depend_on_the_layout():
    for num_ranks in (1, 2):
        for mixture in run_ranks(equal_logits, num_ranks, 3):
            assert mixture.item() == pytest.approx(3.5)
