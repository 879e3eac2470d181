"""The one table of tolerances, each with its reason (fp32, unless it says bf16)."""

import torch
from torch import Tensor

from tests.parity.measure import Measured

LOSS_ABSOLUTE = 1e-5
"""Sums over another order of ranks; the loss is about 5."""
LOGITS_ABSOLUTE = 1e-5
"""As the loss; logits are of order 1."""
GRAD_NORM_RELATIVE = 1e-5
"""One number from all gradients; errors average out."""
GRADIENT_RELATIVE = 1e-4
"""Of a gradient's largest entry, between layouts: summation order over ranks and tokens."""
GOLDEN_GRADIENT_RELATIVE = 1e-5
"""Of a gradient's largest entry, against the authors' code (tests/golden)."""
BF16_LOSS_ABSOLUTE = 1e-2
"""bf16 keeps 8 bits: each rounding is up to 0.4%, averaged over a batch; the loss is about 5."""
FUSED_TRAJECTORY_ABSOLUTE = 2e-5
"""Of each of twenty losses, kernels on and off in fp32: rounding, carried on by AdamW."""
WEIGHTS_ABSOLUTE = 1e-5
"""After three AdamW steps with eps 1e-5; a smaller eps amplifies gradients that are noise."""


def largest_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; NaN counts as infinite."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = (actual.double() - expected.double()).abs()
    return float(torch.nan_to_num(difference, nan=float("inf")).max())


def gradient_violations(
    actual: dict[str, Tensor], expected: dict[str, Tensor], relative: float
) -> list[str]:
    """Gradients further apart than `relative` times the expected one's largest entry."""
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    violations = []
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        difference = largest_difference(actual[name], gradient)
        # A gradient that is nothing but rounding noise (a key's bias) has no scale of its own.
        if difference > relative * max(scale, 1e-6):
            violations.append(f"gradient of {name}: {difference:.2e} of {scale:.2e}")
    return violations


def violations(actual: Measured, expected: Measured) -> list[str]:
    """Everything in which one layout differs from another beyond the table."""
    found = []
    logits = largest_difference(actual.logits, expected.logits)
    if logits > LOGITS_ABSOLUTE:
        found.append(f"logits: {logits:.2e}")
    for step, (a, e) in enumerate(zip(actual.losses, expected.losses, strict=True)):
        if not abs(a - e) <= LOSS_ABSOLUTE:
            found.append(f"loss of step {step}: {a} against {e}")
    for step, (a, e) in enumerate(zip(actual.grad_norms, expected.grad_norms, strict=True)):
        if not abs(a - e) <= GRAD_NORM_RELATIVE * e:
            found.append(f"gradient norm of step {step}: {a} against {e}")
    found += gradient_violations(actual.gradients, expected.gradients, GRADIENT_RELATIVE)
    for name, weight in expected.weights.items():
        difference = largest_difference(actual.weights[name], weight)
        if difference > WEIGHTS_ABSOLUTE:
            found.append(f"weight {name}: {difference:.2e}")
    return found
