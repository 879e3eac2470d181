"""Prompts padded on the right: `generate` continues from the last column, so they are moved."""

import torch
from torch import Tensor


def has_right_padding(mask: Tensor) -> bool:
    """Whether a row of [b, tokens] ends with padding."""
    return bool((mask[:, -1] == 0).any())


def move_padding_left(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate each row until its last column is a token: [b, tokens], [b, tokens]."""
    length = mask.size(1)
    columns = torch.arange(length, device=mask.device)
    # The last token's column; a row without tokens stays as it is.
    ends = torch.where(mask != 0, columns + 1, 0).amax(dim=1, keepdim=True)
    order = (columns - (length - ends)) % length
    return ids.gather(1, order.to(ids.device)), mask.gather(1, order)
