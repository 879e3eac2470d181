"""A linear layer's weight gradient added to an fp32 buffer, dW += dy^T x, in one product.

Composed, the product is rounded to bf16 and added in a kernel of its own, which reads and writes
the fp32 buffer once more. cuBLAS adds while it multiplies, with fp32 sums of bf16 inputs; torch
offers that on CUDA (`addmm` with `out_dtype`). Elsewhere it is composed.
"""

import torch
from torch import Tensor


def add_weight_gradient(gradient: Tensor, dy: Tensor, x: Tensor) -> None:
    """Add a batch's part of dW in place.

    Args:
        gradient: [outputs, inputs], in fp32 or in dy's dtype; contiguous.
        dy: [rows, outputs].
        x: [rows, inputs], in dy's dtype.
    """
    if gradient.dtype == dy.dtype:
        gradient.addmm_(dy.t(), x)
    elif gradient.is_cuda:
        torch.addmm(gradient, dy.t(), x, out_dtype=gradient.dtype, out=gradient)
    else:
        gradient.add_(dy.t() @ x)
