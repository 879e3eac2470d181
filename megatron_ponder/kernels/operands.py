"""Operand types that several kernels share, in both their torch and their Triton versions."""

from torch import Tensor

Branch = tuple[Tensor, Tensor | None]
"""Output of a residual branch, [s, b, h], and its bias, not yet added, [h] or None."""

NormParameters = tuple[Tensor, Tensor | None]
"""A norm's weight and bias, each [h]. The bias is None for RMSNorm."""
