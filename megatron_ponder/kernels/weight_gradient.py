"""Accumulate a linear layer's weight gradient into an fp32 buffer, dW += dy^T x, in one GEMM.

The composed form rounds dy^T x to bf16 and adds it in a second kernel, which loads and stores
the fp32 buffer once more. cuBLAS accumulates inside the GEMM, in fp32 for bf16 inputs. torch
exposes this on CUDA (`addmm` with `out_dtype`). On other devices the composed form runs.
"""

import torch
from torch import Tensor


def add_weight_gradient(gradient: Tensor, dy: Tensor, x: Tensor) -> None:
    """Add one batch's dW to `gradient`, in place.

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
