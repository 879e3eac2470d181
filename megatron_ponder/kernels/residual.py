"""Residual adds fused with norms, and norms whose backward adds the residual gradient.

    add_branches            t = x + sum over branches of (y + c)
    norm_beside_residual    x itself, and n_i = norm_i(x) for one norm or two of the same kind
    add_and_norm            t = x + y + c,  n = norm(t)

    backward
        add_branches            dx = dy = dt;  dc = sum of dt over all rows, one for all branches
        norm_beside_residual    dx = (gradient of x itself) + the norms', which is the formula of
                                `kernels.slot_norm` with g = sum of dn_i w_i
        add_and_norm            dx = dy = dt + the norm's;  dc = sum of dx over all rows

Composed, a bias is added in a launch of its own, each norm reads what was just written, and
autograd adds up the gradients of everything that read x; torch's norms on CUDA read dy and x twice
in the backward, for dx and for the weights. With Triton each is one launch forward and one
backward, beside a small sum of parts of the parameters' gradients. A sum is rounded once, and the
norm is of the rounded row, which the backward reads. Per element of e bytes:

                                      forward              backward
                                      composed   kernel    composed   kernel
    add_branches, one with bias       5 e        3 e       e          e
        two with biases               10 e       4 e       2 e        e
    norm_beside_residual, one         2 e        2 e       8 e        4 e
        two                           4 e        3 e       16 e       5 e
    add_and_norm, without bias        5 e        4 e       8 e        4 e
        with bias                     7 e        4 e       9 e        4 e

One branch without a bias is torch's add in both. On CPU all of it is composed: functions with such
backwards took 0.999 to 1.009 of the time of a training step there (h 128 and 512).
"""

import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.kernels.dispatch import uses_triton
from megatron_ponder.kernels.operands import Branch, NormParameters
from megatron_ponder.kernels.rms_norm import rms_norm


def add_branches(residual: Tensor, *branches: Branch) -> Tensor:
    """Residual stream plus one branch, or plus two parallel ones: [s, b, h]."""
    if uses_triton() and (len(branches) > 1 or branches[0][1] is not None):
        from megatron_ponder.kernels.triton import residual as kernel

        return kernel.add_branches(residual, branches)
    for x, bias in branches:
        residual = residual + (x if bias is None else x + bias)
    return residual


def norm_beside_residual(hidden: Tensor, *norms: NormParameters, eps: float) -> tuple[Tensor, ...]:
    """Residual stream, and one or two norms of it.

    Args:
        hidden: [s, b, h].
        norms: of the same kind.
        eps: added to the mean of squares.

    Returns:
        The residual stream (use it in place of `hidden`, so that its gradient is added in the
        norms' backward), then the normed tensors, all [s, b, h].
    """
    if uses_triton():
        from megatron_ponder.kernels.triton import norm

        return norm.norm_beside_residual(hidden, norms, eps)
    return hidden, *(_norm(hidden, parameters, eps) for parameters in norms)


def add_and_norm(
    residual: Tensor, branch: Branch, norm: NormParameters, *, eps: float
) -> tuple[Tensor, Tensor]:
    """Residual stream plus a branch, and the norm of the sum, both [s, b, h]."""
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
