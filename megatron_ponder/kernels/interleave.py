"""Interleave token embeddings and thoughts into one buffer of slots, and select slots from it.

Every method uses these two reshapes. `embed_and_interleave` fuses the embedding lookup with the
first. All slots of a token are adjacent, so both reshapes work on a contiguous or zig-zag shard of
the tokens as they do on the whole sequence, without communication. With n slots per token, s
tokens, and this rank's rows E of the vocabulary, starting at `first_row`:

    gather       out[t * n]     = scale * E[id_t - first_row]        0 if another rank has the row
    interleave   out[t * n]     = e_t
    both         out[t * n + j] = thoughts[t * (n-1) + j - 1]        j = 1..n-1
    select       out[t * m + i] = hidden[t * n + first + i]          i = 0..m-1

    backward     dE[v]          = scale * sum of dout[t * n] over t with id_t = v, in fp32
                 de_t           = dout[t * n]
                 dthoughts[..]  = dout at the thoughts' slots
                 dhidden        = dout at the selected slots, 0 at the others

The scaled embedding is rounded once, to the weight's dtype. `embed_and_interleave` sweeps memory
once. A forward of several passes still looks its tokens up only once (without thoughts, n = 1) and
calls `interleave` in each pass. Loading the embeddings costs as much as loading the table rows, and
the table's gradient is then summed once instead of once per pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.kernels.dispatch import uses_triton


def embed_and_interleave(
    token_ids: Tensor,
    weight: Tensor,
    thoughts: Tensor | None,
    *,
    scale: float | None,
    first_row: int,
) -> Tensor:
    """Look up and scale the token embeddings, and put each token's thoughts behind its embedding.

    Args:
        token_ids: int64 [b, s], ids in the whole vocabulary.
        weight: this rank's rows of the table, [v / tp, h].
        thoughts: [s * (n-1), b, h]; None if n = 1.
        scale: factor, representable in the weight's dtype; None means 1.
        first_row: vocabulary index of this rank's first row.

    Returns:
        [s * n, b, h]. Slot 0 of a token is zero if another rank has the row.
    """
    if uses_triton():
        from megatron_ponder.kernels.triton import interleave as kernel

        return kernel.embed_and_interleave(token_ids, weight, thoughts, scale, first_row)
    rows = token_ids.t() - first_row  # [b, s] -> [s, b]
    is_mine = (rows >= 0) & (rows < weight.size(0))
    embeddings = F.embedding(rows.where(is_mine, 0), weight)
    embeddings = embeddings if scale is None else embeddings * scale
    embeddings = embeddings * is_mine[..., None]
    return interleave(embeddings, thoughts)


def interleave(token_embeddings: Tensor, thoughts: Tensor | None) -> Tensor:
    """Join token embeddings [s, b, h] and thoughts [s * (n-1), b, h] into slots [s * n, b, h]."""
    if thoughts is None:
        return token_embeddings
    if uses_triton():
        from megatron_ponder.kernels.triton import interleave as kernel

        return kernel.interleave(token_embeddings, thoughts)
    s, b, h = token_embeddings.shape
    # [s*(n-1), b, h] -> [s, n-1, b, h]; joined [s, n, b, h] -> [s*n, b, h]
    by_token = thoughts.view(s, -1, b, h)
    return torch.cat((token_embeddings.unsqueeze(1), by_token), dim=1).view(-1, b, h)


def select_slots(hidden: Tensor, slots_per_token: int, slots: range) -> Tensor:
    """Select m consecutive slots of every token: [s * n, b, h] -> [s * m, b, h]."""
    if len(slots) == slots_per_token:
        return hidden
    if uses_triton():
        from megatron_ponder.kernels.triton import interleave as kernel

        return kernel.select_slots(hidden, slots_per_token, slots)
    _, b, h = hidden.shape
    # [s*n, b, h] -> [s, m, b, h] -> [s*m, b, h]
    kept = hidden.view(-1, slots_per_token, b, h)[:, slots.start : slots.stop]
    return kept.reshape(-1, b, h)
