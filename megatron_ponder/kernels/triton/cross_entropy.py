"""Row statistics of the logits, and their gradient in place; see `kernels.cross_entropy`.

`_statistics` has one program per row. It loads the row once and updates maximum and sum online: for
each block with new maximum m', z becomes z exp(m - m') + sum exp(x - m'). `_gradient` has one
program per row and block of columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 4096


@triton.jit
def _statistics(logits, labels, out, num_rows, row_stride, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    largest = float("-inf")
    total = 0.0
    for first in range(0, num_columns, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        x = tl.load(start + columns, mask=columns < num_columns, other=float("-inf"))
        x = x.to(tl.float32)
        new_largest = tl.maximum(largest, tl.max(x, axis=0))
        total = total * tl.exp(largest - new_largest) + tl.sum(tl.exp(x - new_largest), axis=0)
        largest = new_largest
    label = tl.load(labels + row)
    is_mine = (label >= 0) & (label < num_columns)
    target = tl.load(start + label, mask=is_mine, other=0.0)
    tl.store(out + row, largest)
    tl.store(out + num_rows + row, total)
    tl.store(out + 2 * num_rows + row, target.to(tl.float32))


@triton.jit
def _gradient(
    logits,
    labels,
    log_sums,
    gradients,
    row_stride,
    num_columns,
    num_padded_columns,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = logits + row * row_stride
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(start + columns, mask=columns < num_columns, other=float("-inf")).to(tl.float32)
    probability = tl.exp(x - tl.load(log_sums + row))
    is_label = (columns == tl.load(labels + row)) & (columns < num_columns)
    dx = (probability - tl.where(is_label, 1.0, 0.0)) * tl.load(gradients + row)
    dx = tl.where(columns < num_columns, dx, 0.0)
    tl.store(start + columns, dx.to(logits.dtype.element_ty), mask=columns < num_padded_columns)


def row_statistics_(logits: Tensor, labels: Tensor, num_columns: int) -> Tensor:
    """Triton version of `kernels.cross_entropy.row_statistics_`; needs num_columns >= 1."""
    num_rows, _ = logits.shape
    out = logits.new_empty((3, num_rows), dtype=torch.float32)
    block = min(MAX_BLOCK, triton.next_power_of_2(num_columns))
    if num_rows:
        _statistics[(num_rows,)](
            logits, labels, out, num_rows, logits.stride(0), num_columns, BLOCK=block
        )
    return out


def logits_gradient_(
    logits: Tensor, labels: Tensor, log_sum: Tensor, gradient: Tensor, num_columns: int
) -> None:
    """Triton version of `kernels.cross_entropy.logits_gradient_`."""
    num_rows, num_padded = logits.shape
    block = min(MAX_BLOCK, triton.next_power_of_2(num_padded))
    if num_rows:
        _gradient[(num_rows, triton.cdiv(num_padded, block))](
            logits,
            labels,
            log_sum,
            gradient.contiguous(),
            logits.stride(0),
            num_columns,
            num_padded,
            BLOCK=block,
        )
