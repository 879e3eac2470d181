"""The mixture of embeddings that predicted probabilities make: softmax(logits) times the table."""

import torch
from torch import Tensor


def mix_embeddings(logits: Tensor, embeddings: Tensor, top_k: int | None) -> Tensor:
    """The mixture at every slot.

    Args:
        logits: [..., v].
        embeddings: [v, h], not scaled.
        top_k: how many logits enter, those that equal the smallest of them too; None: all.

    Returns:
        [..., h], of the embeddings' dtype and on their device.
    """
    if top_k is not None:
        smallest = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    probabilities = torch.softmax(logits.float(), dim=-1)
    return probabilities.to(device=embeddings.device, dtype=embeddings.dtype) @ embeddings
