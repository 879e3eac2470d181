"""Vocabulary padding without effect on the loss.

The vocabulary is padded to a round number of rows. If padded logits entered the softmax, the loss
would depend on the padding, and an export without it would be a different model. So they are set to
minus infinity.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


def mask_padded_columns(logits: Tensor, vocab_size: int, tp_group: ProcessGroup) -> Tensor:
    """Set logits of padded vocabulary rows to minus infinity, in place.

    Args:
        logits: [..., padded vocabulary / tp], this rank's columns.
        vocab_size: rows that are real, over all ranks.
        tp_group: the ranks that share the columns.

    Returns:
        `logits`.
    """
    columns = logits.size(-1)
    num_real = min(max(vocab_size - columns * tp_group.rank(), 0), columns)
    return logits if num_real == columns else _MaskColumns.apply(logits, num_real)  # type: ignore[no-untyped-call]


class _MaskColumns(torch.autograd.Function):
    """In-place fill whose backward is the identity.

    Autograd's own in-place slice assignment would copy the whole gradient of the logits to zero its
    masked part. That part is zero already: softmax has no gradient for columns at minus infinity.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, num_real: int) -> Tensor:
        ctx.mark_dirty(logits)
        logits[..., num_real:] = float("-inf")
        return logits

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return grad_outputs[0], None
