"""Cross entropy over some columns of the vocabulary: what a rank can say of its logits alone.

For a row of logits x over the columns that this rank has, with the label's column y:

    statistics   m = max_v x_v;   z = sum_v exp(x_v - m);   t = x_y, or 0 if another rank has y
    gradient     dx_v = g (exp(x_v - lse) - [v = y])        0 in padded columns

Over all ranks lse = M + log sum_r z_r exp(m_r - M), M = max_r m_r, and the loss is lse - sum_r t_r;
that, and the product which makes the logits, is `model.linear_cross_entropy`'s. All in fp32,
whatever the logits' dtype; the gradient overwrites the logits.

In memory traffic per logit of e bytes: statistics e, gradient 2 e. Composed by torch in fp32, as
megatron-core does, it is 52 bytes in bf16 (cast, maximum, difference, exponential, sum, quotient;
then gradient and cast).
"""

import torch
from torch import Tensor

from megatron_ponder.kernels.dispatch import uses_triton


def row_statistics_(logits: Tensor, labels: Tensor, num_columns: int) -> Tensor:
    """Maximum, sum of exponentials and the label's logit of each row.

    Args:
        logits: [rows, columns], contiguous; not to be read afterwards.
        labels: int64 [rows], columns; a number outside [0, num_columns) is another rank's.
        num_columns: columns that are no padding, the first ones; may be 0.

    Returns:
        fp32 [3, rows]: m, z and t of the module's formula; minus infinity and 0 without columns.
    """
    if num_columns == 0:
        nothing = logits.new_zeros((3, logits.size(0)), dtype=torch.float32)
        nothing[0] = float("-inf")
        return nothing
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
    """Overwrite logits with the loss's gradient by them.

    Args:
        logits: [rows, columns], contiguous.
        labels: as above.
        log_sum: fp32 [rows], lse of the module's formula, over all ranks.
        gradient: fp32 [rows], g: the gradient by each row's loss.
        num_columns: as above.

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
    """exp(x - a) in fp32 for a number a per row; overwrites fp32 logits."""
    return logits.float().sub_(by_row[:, None]).exp_()
