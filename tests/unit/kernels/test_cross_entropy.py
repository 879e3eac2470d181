"""Statistics and gradient of rows of logits: torch's cross entropy, and Triton against torch."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ponder.kernels.cross_entropy import logits_gradient_, row_statistics_
from megatron_ponder.kernels.dispatch import kernels_chosen
from tests.unit.kernels.tolerances import DEVICE, FORWARD, GRADIENT, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(5, 37, 37), (3, 64, 50), (1, 1, 1), (4, 4099, 4097), (2, 8, 0), (0, 8, 8)]
"""Rows, columns, real columns."""


def inputs(rows, columns, real, dtype):
    generator = torch.Generator().manual_seed(rows * columns)
    logits = torch.randn(rows, columns, generator=generator).mul_(3).to(dtype)
    labels = torch.randint(-2, max(real, 1) + 2, (rows,), generator=generator)
    gradient = torch.rand(rows, generator=generator)
    return logits.to(DEVICE), labels.to(DEVICE), gradient.to(DEVICE)


def test_is_torchs_cross_entropy():
    logits, _, gradient = inputs(6, 40, 33, torch.float32)
    labels = torch.tensor([0, 5, 32, 7, 7, 31], device=DEVICE)
    leaf = logits.clone().requires_grad_()
    losses = F.cross_entropy(leaf[:, :33], labels, reduction="none")
    losses.backward(gradient)
    largest, total, target = row_statistics_(logits.clone(), labels, 33)
    log_sum = largest + total.log()
    torch.testing.assert_close(log_sum - target, losses.detach())
    logits_gradient_(logits, labels, log_sum, gradient, 33)
    torch.testing.assert_close(logits, leaf.grad)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, columns, real", SHAPES)
def test_triton_equals_torch(rows, columns, real, dtype):
    logits, labels, gradient = inputs(rows, columns, real, dtype)
    log_sum = torch.full((rows,), 7.0, device=DEVICE)
    found = {}
    for kernels in ("torch", "triton"):
        with kernels_chosen(kernels):
            statistics = row_statistics_(logits.clone(), labels, real)
            overwritten = logits.clone()
            logits_gradient_(overwritten, labels, log_sum, gradient, real)
            found[kernels] = statistics, overwritten
    for actual, expected in zip(found["triton"][0], found["torch"][0], strict=True):
        if real:
            assert_close(actual, expected, FORWARD)
        else:
            assert torch.equal(actual, expected)
    assert_close(found["triton"][1], found["torch"][1], GRADIENT)
    assert not found["triton"][1][:, real:].any()


def test_a_label_next_to_the_right_one_is_caught():
    logits, _, gradient = inputs(4, 16, 16, torch.float32)
    labels = torch.arange(4, device=DEVICE)
    with kernels_chosen("triton"):
        wrong = row_statistics_(logits.clone(), labels + 1, 16)[2]
    with pytest.raises(AssertionError):
        assert_close(wrong, row_statistics_(logits.clone(), labels, 16)[2], FORWARD)
