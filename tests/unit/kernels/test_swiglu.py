"""SwiGLU against its composition, its own backward against finite differences, and in Triton."""

import pytest
import torch

from megatron_ponder.kernels.dispatch import kernels_chosen
from megatron_ponder.kernels.swiglu import swiglu
from tests.reference import kernels
from tests.unit.kernels.tolerances import DEVICE, FORWARD, GRADIENT, assert_close


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 2, 8), (5, 2), (1, 1, 6), (0, 4)])
def test_equals_the_composition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    gradient = torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = swiglu(ours), kernels.swiglu(theirs)
    y.backward(gradient)
    expected.backward(gradient)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_gradient_with_strided_input_and_gradient() -> None:
    whole = torch.randn(3, 2, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x: swiglu(x[..., 2:10].transpose(0, 1)).transpose(0, 2), (whole,)
    )


def with_gradient(form, x, gradient):
    leaf = x.clone().requires_grad_()
    with kernels_chosen(form):
        y = swiglu(leaf)
        y.backward(gradient)
    return y.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 2, 8), (5, 2), (2, 2, 14), (1, 1, 2500), (0, 4)])
def test_triton_equals_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(shape[-1])
    x = (3 * torch.randn(shape, generator=generator)).to(DEVICE, dtype)
    gradient = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator).to(DEVICE, dtype)
    y, dx = with_gradient("triton", x, gradient)
    expected, expected_dx = with_gradient("torch", x.float(), gradient.float())
    assert_close(y, expected.to(dtype), FORWARD)
    assert_close(dx, expected_dx.to(dtype), GRADIENT)


def test_triton_takes_strided_input_and_gradient() -> None:
    whole = torch.randn(3, 2, 12, device=DEVICE)[..., 2:10].transpose(0, 1)
    gradient = torch.randn(4, 3, 2, device=DEVICE).permute(2, 1, 0)
    for ours, expected in zip(
        with_gradient("triton", whole, gradient),
        with_gradient("torch", whole, gradient),
        strict=True,
    ):
        assert_close(ours, expected, GRADIENT)


def test_triton_leaves_its_input_as_it_is() -> None:
    """Recomputation and other readers of the projection may follow."""
    x = torch.randn(3, 8, device=DEVICE, requires_grad=True)
    before = x.detach().clone()
    with kernels_chosen("triton"):
        y = swiglu(x)
        for _ in range(2):
            (gradient,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    assert torch.equal(x.detach(), before)
    assert_close(gradient, with_gradient("torch", before, torch.ones(3, 4).to(DEVICE))[1], GRADIENT)


def test_swapped_halves_are_caught() -> None:
    x, gradient = torch.randn(3, 8, device=DEVICE), torch.randn(3, 4, device=DEVICE)
    right = with_gradient("torch", x, gradient)
    wrong = with_gradient("triton", x.roll(4, dims=-1), gradient)
    with pytest.raises(AssertionError):
        assert_close(wrong[0], right[0], FORWARD)
