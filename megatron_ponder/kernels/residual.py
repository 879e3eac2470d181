"""Residual adds fused with norms, and norms whose backward adds the residual gradient.

    add_branches            t = x + sum over branches of (y + c)
    norm_beside_residual    returns x, and n_i = norm_i(x) for one or two norms of the same kind
    add_and_norm            t = x + y + c,  n = norm(t)

    backward
        add_branches            dx = dy = dt;  dc = sum of dt over all rows, shared by all branches
        norm_beside_residual    dx = (gradient of the returned x) + (gradient through the norms),
                                the latter by the formula of `kernels.slot_norm` with
                                g = sum of dn_i w_i
        add_and_norm            dx = dy = dt + (gradient through the norm);
                                dc = sum of dx over all rows

In the composed form each bias add is a kernel launch, each norm loads what was just stored, and
autograd sums the gradients of all uses of x. On CUDA, the backward of torch's norms loads dy and x
twice, once for dx and once for the weights. With Triton each function is one launch forward and one
backward, plus a small sum of the partial gradients of the parameters. A sum is rounded once. The
norm is taken of the rounded row, which the backward loads. Memory traffic per element of e bytes:

                                      forward              backward
                                      composed   kernel    composed   kernel
    add_branches, one with bias       5 e        3 e       e          e
        two with biases               10 e       4 e       2 e        e
    norm_beside_residual, one         2 e        2 e       8 e        4 e
        two                           4 e        3 e       16 e       5 e
    add_and_norm, without bias        5 e        4 e       8 e        4 e
        with bias                     7 e        4 e       9 e        4 e

One branch without a bias uses torch's add in both versions. On CPU everything is composed: fused
backwards took 0.999 to 1.009 times the time of a training step there (h 128 and 512).
"""

import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.kernels.dispatch import uses_triton
from megatron_ponder.kernels.operands import Branch, NormParameters
from megatron_ponder.kernels.rms_norm import rms_norm


def add_branches(residual: Tensor, *branches: Branch) -> Tensor:
    """Add one branch, or two parallel branches, to the residual stream: [s, b, h]."""
    if uses_triton() and (len(branches) > 1 or branches[0][1] is not None):
        from megatron_ponder.kernels.triton import residual as kernel

        return kernel.add_branches(residual, branches)
    for x, bias in branches:
        residual = residual + (x if bias is None else x + bias)
    return residual


def norm_beside_residual(hidden: Tensor, *norms: NormParameters, eps: float) -> tuple[Tensor, ...]:
    """Apply one or two norms to the residual stream.

    Args:
        hidden: the residual stream, [s, b, h].
        norms: parameters of one or two norms of the same kind.
        eps: added to the mean of squares.

    Returns:
        The residual stream, then the normed tensors, all [s, b, h]. Use the returned residual
        stream in place of `hidden`; the backward of the norms then adds its gradient.
    """
    if uses_triton():
        from megatron_ponder.kernels.triton import norm

        return norm.norm_beside_residual(hidden, norms, eps)
    return hidden, *(_norm(hidden, parameters, eps) for parameters in norms)


def add_and_norm(
    residual: Tensor, branch: Branch, norm: NormParameters, *, eps: float
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream, and norm the sum. Returns both, each [s, b, h]."""
    if uses_triton():
        from megatron_ponder.kernels.triton import norm as kernel

        return kernel.add_and_norm(residual, branch, norm, eps)
    total = add_branches(residual, branch)
    return total, _norm(total, norm, eps)


def _norm(x: Tensor, parameters: NormParameters, eps: float) -> Tensor:
    weight, bias = parameters
    if bias is None:
        return rms_norm(x, weight, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)
