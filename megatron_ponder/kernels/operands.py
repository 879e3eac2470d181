"""Types of operands that several kernels take; below both their composed and their Triton forms."""

from torch import Tensor

Branch = tuple[Tensor, Tensor | None]
"""Output of a residual branch, [s, b, h], and the bias still to be added, [h] or None."""

NormParameters = tuple[Tensor, Tensor | None]
"""A norm's weight and bias, each [h]. RMSNorm has no bias, LayerNorm has one."""
