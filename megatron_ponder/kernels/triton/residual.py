"""Adds one or two branches and their biases to the residual stream; see `kernels.residual`.

A program computes one block of one row. The backward needs no kernel. It returns the incoming
gradient for the residual stream and every branch, and sums it over rows once for all biases.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_ponder.kernels.operands import Branch

MAX_BLOCK = 1024


@triton.jit
def _add(
    residual,
    branch,
    bias,
    branch_2,
    bias_2,
    total,
    width,
    HAS_BIAS: tl.constexpr,
    HAS_SECOND: tl.constexpr,
    HAS_SECOND_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    at = row * width + columns
    x = tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_SECOND:
        x += tl.load(branch_2 + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_SECOND_BIAS:
        x += tl.load(bias_2 + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(total + at, x.to(total.dtype.element_ty), mask=inside)


def add_branches(residual: Tensor, branches: Sequence[Branch]) -> Tensor:
    """Triton version of `kernels.residual.add_branches`, for one or two branches."""
    return _AddBranches.apply(residual, *(tensor for branch in branches for tensor in branch))


class _AddBranches(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        branch: Tensor,
        bias: Tensor | None,
        branch_2: Tensor | None = None,
        bias_2: Tensor | None = None,
    ) -> Tensor:
        ctx.has_bias = [bias is not None, bias_2 is not None][: 1 if branch_2 is None else 2]
        residual, branch = residual.contiguous(), branch.contiguous()
        total = torch.empty_like(residual)
        width = residual.size(-1)
        block = min(MAX_BLOCK, triton.next_power_of_2(width))
        _add[(residual.numel() // width, triton.cdiv(width, block))](
            residual,
            branch,
            residual if bias is None else bias,
            residual if branch_2 is None else branch_2.contiguous(),
            residual if bias_2 is None else bias_2,
            total,
            width,
            HAS_BIAS=bias is not None,
            HAS_SECOND=branch_2 is not None,
            HAS_SECOND_BIAS=bias_2 is not None,
            BLOCK=block,
        )
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = grad_outputs
        d_bias = gradient.flatten(0, -2).sum(dim=0) if any(ctx.has_bias) else None
        by_branch = ((gradient, d_bias if has_bias else None) for has_bias in ctx.has_bias)
        return gradient, *(part for branch in by_branch for part in branch)
