"""Padding after tokens: `generate` reads the last column, so it gets the last token's output.

Columns of padding carry the output of the token before them in their row. Then prompts padded on
the right, or on both sides, continue where they end, whatever they are given as and whatever the
way of decoding; the cache keeps their columns as they are.
"""

import torch
from torch import Tensor


def last_tokens(mask: Tensor) -> Tensor:
    """The column of the token at or before each column; the first one where there is none.

    Args:
        mask: [b, s], zeros for padding.

    Returns:
        int64 [b, s].
    """
    columns = torch.arange(mask.size(1), device=mask.device)
    return torch.where(mask != 0, columns, 0).cummax(dim=1).values


def check_prompts(mask: Tensor, num_seen: int, chunk_size: int | None) -> None:
    """Refuse prompts that have no last token to read.

    Args:
        mask: [b, tokens in the cache + s], zeros for padding.
        num_seen: tokens in the cache.
        chunk_size: how many tokens of a prompt run at a time; None: all.

    Raises:
        ValueError: a row has only padding, or its last chunk may.
    """
    new = mask[:, num_seen:]
    empty = (new == 0).all(dim=1)
    if new.size(1) and bool(empty.any()):
        rows = ", ".join(map(str, empty.nonzero().flatten().tolist()))
        raise ValueError(
            f"attention_mask: row {rows} has no new token, so nothing says what to continue."
        )
    if chunk_size is not None and bool((new[:, -1:] == 0).any()):
        raise ValueError("prefill_chunk_size needs prompts padded on the left.")
