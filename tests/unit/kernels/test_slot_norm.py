"""Norm of some stages: against torch's norm of the slots copied out, with gradients."""

import pytest
import torch

from megatron_ponder.kernels.dispatch import kernels_chosen
from megatron_ponder.kernels.slot_norm import norm_slots
from tests.reference import kernels as reference
from tests.unit.kernels.tolerances import DEVICE, FORWARD, GRADIENT, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
SHAPES = [
    (5, 2, 24, 2, range(1, 2)),
    (3, 1, 7, 3, range(2)),
    (4, 3, 33, 3, range(1, 3)),
    (140, 2, 5, 2, range(1)),
    (1, 1, 3, 2, range(1)),
    (2, 1, 8, 2, range(2)),
]
"""Tokens, batch, hidden, stages, stages read."""


def inputs(s, b, h, n, dtype, *, is_layer_norm):
    generator = torch.Generator().manual_seed(s * h)
    hidden = torch.randn(s * n, b, h, generator=generator).add_(0.3).to(dtype)
    weight = torch.rand(h, generator=generator).add_(0.5).to(dtype)
    bias = torch.randn(h, generator=generator).to(dtype) if is_layer_norm else None
    return hidden.to(DEVICE), weight.to(DEVICE), None if bias is None else bias.to(DEVICE)


def results(kernels, hidden, weight, bias, n, stages, gradient):
    leaves = [None if t is None else t.clone().requires_grad_() for t in (hidden, weight, bias)]
    with kernels_chosen(kernels):
        y = norm_slots(leaves[0], n, stages, *leaves[1:], EPS, is_layer_norm=bias is not None)
        y.backward(gradient)
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_layer_norm", [False, True])
@pytest.mark.parametrize("s, b, h, n, stages", SHAPES)
def test_triton_equals_torch(s, b, h, n, stages, is_layer_norm, dtype):
    hidden, weight, bias = inputs(s, b, h, n, dtype, is_layer_norm=is_layer_norm)
    generator = torch.Generator().manual_seed(3)
    gradient = torch.randn(s * len(stages), b, h, generator=generator).to(DEVICE, dtype)
    ours = results("triton", hidden, weight, bias, n, stages, gradient)
    in_fp32 = [None if t is None else t.float() for t in (hidden, weight, bias)]
    expected = results("torch", *in_fp32, n, stages, gradient.float())
    assert_close(ours[0], expected[0].to(dtype), FORWARD)
    for actual, wanted in zip(ours[1:], expected[1:], strict=True):
        assert_close(actual, wanted.to(dtype), GRADIENT)
    unread = [j for j in range(n) if j not in stages]
    assert not ours[1].view(s, n, b, h)[:, unread].any()


def test_reference_is_torchs_norm():
    hidden, weight, bias = inputs(4, 2, 6, 2, torch.float32, is_layer_norm=True)
    y = norm_slots(hidden, 2, range(1, 2), weight, bias, EPS, is_layer_norm=True)
    assert torch.equal(y, reference.norm(hidden[1::2], weight, bias, EPS))
    y = norm_slots(hidden, 2, range(1, 2), weight, None, EPS, is_layer_norm=False)
    torch.testing.assert_close(y, reference.norm(hidden[1::2], weight, None, EPS))


def test_a_forgotten_mean_is_caught():
    hidden, weight, bias = inputs(4, 2, 6, 2, torch.float32, is_layer_norm=True)
    with kernels_chosen("triton"):
        wrong = norm_slots(hidden, 2, range(1), weight, None, EPS, is_layer_norm=False) + bias
    right = norm_slots(hidden, 2, range(1), weight, bias, EPS, is_layer_norm=True)
    with pytest.raises(AssertionError):
        assert_close(wrong, right, FORWARD)
