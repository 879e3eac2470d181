"""Cross entropy over one rank's columns of the vocabulary, before any communication.

For a row of logits x over this rank's columns, with the label in column y:

    statistics   m = max_v x_v;   z = sum_v exp(x_v - m);   t = x_y, or 0 if another rank has y
    gradient     dx_v = g (exp(x_v - lse) - [v = y])        0 in padded columns

Over all ranks lse = M + log sum_r z_r exp(m_r - M), M = max_r m_r, and the loss is lse - sum_r t_r.
`model.linear_cross_entropy` computes these, and the head matmul. The arithmetic is fp32 for any
dtype of the logits. The gradient overwrites the logits.

Memory traffic per logit of e bytes: statistics e, gradient 2 e. The same composed from torch
operations in fp32, as in megatron-core, moves 52 bytes in bf16 (cast, maximum, difference,
exponential, sum, quotient; then gradient and cast).
"""

import torch
from torch import Tensor

from megatron_ponder.kernels.dispatch import uses_triton


def row_statistics_(logits: Tensor, labels: Tensor, num_columns: int) -> Tensor:
    """Maximum, sum of exponentials and the label's logit of each row.

    Args:
        logits: [rows, columns], contiguous; the call may overwrite them.
        labels: int64 [rows], column indices; a label outside [0, num_columns) is on another rank.
        num_columns: number of leading columns that are not padding; may be 0.

    Returns:
        fp32 [3, rows]: m, z and t of the module's formula. If num_columns is 0: minus infinity, 0
        and 0.
    """
    if num_columns == 0:
        empty = logits.new_zeros((3, logits.size(0)), dtype=torch.float32)
        empty[0] = float("-inf")
        return empty
    if uses_triton():
        from megatron_ponder.kernels.triton import cross_entropy

        return cross_entropy.row_statistics_(logits, labels, num_columns)
    real = logits[:, :num_columns]
    largest = real.amax(dim=1).float()
    is_mine = (labels >= 0) & (labels < num_columns)
    column = labels.where(is_mine, 0)
    target = real.gather(1, column[:, None]).squeeze(1).float().where(is_mine, 0.0)
    total = _exp_of_difference(real, largest).sum(dim=1)
    return torch.stack((largest, total, target))


def logits_gradient_(
    logits: Tensor, labels: Tensor, log_sum: Tensor, gradient: Tensor, num_columns: int
) -> Tensor:
    """Overwrite the logits with their gradient.

    Args:
        logits: [rows, columns], contiguous.
        labels: as in `row_statistics_`.
        log_sum: fp32 [rows], lse of the module's formula, over all ranks.
        gradient: fp32 [rows], g: the gradient of each row's loss.
        num_columns: as in `row_statistics_`.

    Returns:
        `logits`.
    """
    if uses_triton():
        from megatron_ponder.kernels.triton import cross_entropy

        cross_entropy.logits_gradient_(logits, labels, log_sum, gradient, num_columns)
        return logits
    real = logits[:, :num_columns]
    probabilities = _exp_of_difference(real, log_sum)
    is_mine = (labels >= 0) & (labels < num_columns)
    if num_columns:
        column = labels.where(is_mine, 0)
        probabilities.scatter_add_(1, column[:, None], -is_mine.float()[:, None])
    real.copy_(probabilities.mul_(gradient[:, None]))
    logits[:, num_columns:] = 0
    return logits


def _exp_of_difference(logits: Tensor, by_row: Tensor) -> Tensor:
    """exp(x - a) in fp32, with one number a per row. Overwrites the logits if they are fp32."""
    return logits.float().sub_(by_row[:, None]).exp_()
