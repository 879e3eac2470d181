"""GELU and its bias: torch's form, and Triton's against it with all gradients."""

import pytest
import torch

from megatron_ponder.kernels.dispatch import kernels_chosen
from megatron_ponder.kernels.gelu import gelu
from tests.reference import kernels as reference
from tests.unit.kernels.tolerances import DEVICE, FORWARD, GRADIENT, assert_close

SHAPES = [(3, 2, 8), (5, 1), (67, 2, 7), (1, 1, 1500), (0, 4)]
"""The third has more rows than a program of the backward takes, the fourth more than one block."""


def inputs(shape, dtype, *, has_bias):
    generator = torch.Generator().manual_seed(shape[-1])
    x = 2 * torch.randn(shape, generator=generator)
    bias = torch.randn(shape[-1], generator=generator) if has_bias else None
    gradient = torch.randn(shape, generator=generator)
    return [None if t is None else t.to(DEVICE, dtype) for t in (x, bias, gradient)]


def results(kernels, x, bias, gradient, *, is_tanh):
    leaves = [None if t is None else t.clone().requires_grad_() for t in (x, bias)]
    with kernels_chosen(kernels):
        y = gelu(*leaves, is_tanh=is_tanh)
        y.backward(gradient)
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_tanh", [False, True], ids=["exact", "tanh"])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_triton_equals_torch(shape, has_bias, is_tanh, dtype):
    given = inputs(shape, dtype, has_bias=has_bias)
    ours = results("triton", *given, is_tanh=is_tanh)
    in_fp32 = [None if t is None else t.float() for t in given]
    expected = results("torch", *in_fp32, is_tanh=is_tanh)
    assert len(ours) == 2 + has_bias
    assert_close(ours[0], expected[0].to(dtype), FORWARD)
    for actual, wanted in zip(ours[1:], expected[1:], strict=True):
        assert_close(actual, wanted.to(dtype), GRADIENT)


@pytest.mark.parametrize("is_tanh", [False, True], ids=["exact", "tanh"])
def test_triton_far_from_zero(is_tanh):
    """Where the gate is 0 or 1, and its slope 0 times something large."""
    x = torch.tensor([-3e4, -40.0, -9.0, -1e-9, 0.0, 1e-9, 9.0, 40.0, 3e4], device=DEVICE)
    ours = results("triton", x, None, torch.ones_like(x), is_tanh=is_tanh)
    expected = results("torch", x, None, torch.ones_like(x), is_tanh=is_tanh)
    for actual, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, wanted, atol=1e-6, rtol=1e-5)


def test_torch_form_is_torchs():
    x, bias, _ = inputs((3, 2, 8), torch.float32, has_bias=True)
    for is_tanh in (False, True):
        assert torch.equal(gelu(x, bias, is_tanh=is_tanh), reference.gelu(x, bias, is_tanh))


def test_triton_takes_strided_input_and_gradient():
    whole, bias, _ = inputs((3, 2, 8), torch.float32, has_bias=True)
    x, bias = whole[..., 1:5].transpose(0, 1), bias[1:5]
    gradient = torch.randn(4, 3, 2, device=DEVICE).permute(2, 1, 0)
    ours = results("triton", x, bias, gradient, is_tanh=False)
    expected = results("torch", x, bias, gradient, is_tanh=False)
    for actual, wanted in zip(ours, expected, strict=True):
        assert_close(actual, wanted, GRADIENT)


def test_the_other_form_is_caught():
    """They differ by 5e-4 at most."""
    given = inputs((67, 2, 7), torch.float32, has_bias=True)
    right = results("torch", *given, is_tanh=False)
    wrong = results("triton", *given, is_tanh=True)
    for actual, wanted in zip(wrong, right, strict=True):
        with pytest.raises(AssertionError):
            assert_close(actual, wanted, GRADIENT)
