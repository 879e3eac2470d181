"""How a sequence is sharded over context-parallel ranks, and gathered again.

A sequence of s tokens is cut into 2c chunks for c ranks; rank r holds chunks r and 2c - 1 - r, so
that all ranks do the same work in causal attention. The slots of a token lie together, so the same
sharding holds for an interleaved sequence: each rank interleaves its own tokens, and only attention
needs other ranks. TransformerEngine and megatron-core shard sequences in the same way.
"""

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.distributed import ProcessGroup


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """The two chunks, of 2 x `size`, that a rank holds, in order."""
    return rank, 2 * size - 1 - rank


def local_shard(whole: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part of a sequence.

    Args:
        whole: the same on all ranks; size s in `dim`, a multiple of 2 x ranks.
        dim: of the sequence.
        group: the context-parallel ranks.

    Returns:
        Size s / ranks in `dim`, contiguous; `whole` itself on a single rank.
    """
    size = group.size()
    if size == 1:
        return whole
    chunks = whole.chunk(2 * size, dim=dim)
    return torch.cat([chunks[c] for c in chunks_of(group.rank(), size)], dim=dim)


def gather_sequence(shard: Tensor, group: ProcessGroup) -> Tensor:
    """The whole sequence in order; the backward sums the gradients of all ranks for each part.

    Args:
        shard: [slots / ranks, ...].
        group: the context-parallel ranks.

    Returns:
        [slots, ...].
    """
    size = group.size()
    by_rank = gather_from_sequence_parallel_region(shard.contiguous(), group=group)
    held = [chunk for rank in range(size) for chunk in chunks_of(rank, size)]
    chunks = by_rank.chunk(2 * size)
    return torch.cat([chunks[held.index(c)] for c in range(2 * size)])
