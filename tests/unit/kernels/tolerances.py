"""How far a kernel may be from its reference, each with its reason.

Both compute in fp32 from the same inputs and round once where they store, so that in 16 bits they
differ where a value lies near the middle of two numbers: by one unit in the last place. Triton's
interpreter (3.9) cuts off what does not fit into bf16, where a GPU rounds: also less than a unit.
"""

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Where kernels are tested: compiled on a GPU, in Triton's interpreter without one."""
FORWARD = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Relative to the largest entry. fp32: another order of sums. 16 bits: one unit in the last place
of a value near the largest."""
GRADIENT = {torch.float32: 1e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}
"""As forward; a unit more, because gradients go through a rounded output."""


def assert_close(actual: Tensor, expected: Tensor, relative: dict[torch.dtype, float]) -> None:
    """Within a tolerance of the dtype, relative to the largest expected entry."""
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    if actual.numel() == 0:
        return
    difference = (actual.double() - expected.double()).abs()
    difference = torch.nan_to_num(difference, nan=float("inf"))
    scale = max(float(expected.double().abs().max()), 1e-30)
    assert float(difference.max()) <= relative[actual.dtype] * scale, (
        float(difference.max()) / scale
    )
