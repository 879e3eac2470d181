"""Between stages and the interleaved sequence: the two reshapes that every method is made of.

Both work on a contiguous or zig-zag shard of the token sequence exactly as on the whole, because
all slots of a token lie together; no communication is ever needed. The fused kernels of this
operation replace these two functions and are tested against them.

Shapes: s tokens (local), b micro-batch, h hidden, n stages.
"""

import torch
from torch import Tensor


def interleave(token_embeddings: Tensor, thoughts: Tensor | None) -> Tensor:
    """Put each token's embedding before its thoughts.

    out[t * n] = token_embeddings[t];  out[t * n + j] = thoughts[t * (n-1) + j - 1], j = 1..n-1

    Args:
        token_embeddings: [s, b, h].
        thoughts: [s * (n-1), b, h], itself interleaved; None where there are none yet (n = 1).

    Returns:
        [s * n, b, h], contiguous.
    """
    if thoughts is None:
        return token_embeddings
    s, b, h = token_embeddings.shape
    # [s*(n-1), b, h] -> [s, n-1, b, h]; joined [s, n, b, h] -> [s*n, b, h]
    stages = thoughts.view(s, -1, b, h)
    return torch.cat((token_embeddings.unsqueeze(1), stages), dim=1).view(-1, b, h)


def select_stages(hidden: Tensor, num_stages: int, stages: range) -> Tensor:
    """Keep some stages of an interleaved sequence.

    out[t * m + i] = hidden[t * num_stages + stages[i]], m = len(stages)

    Args:
        hidden: [s * num_stages, b, h].
        num_stages: slots per token in `hidden`.
        stages: the consecutive stages to keep.

    Returns:
        [s * m, b, h]; `hidden` itself where every stage is kept.
    """
    if len(stages) == num_stages:
        return hidden
    _, b, h = hidden.shape
    # [s*n, b, h] -> [s, m, b, h] -> [s*m, b, h]
    kept = hidden.view(-1, num_stages, b, h)[:, stages.start : stages.stop]
    return kept.reshape(-1, b, h)
