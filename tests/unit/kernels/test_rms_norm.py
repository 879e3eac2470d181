"""RMSNorm against torch's, its own backward against finite differences."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ponder.kernels.rms_norm import rms_norm

EPS = 1e-5


@pytest.mark.parametrize("shape", [(3, 2, 8), (5, 1), (1, 1, 7), (4, 0, 8)])
def test_equals_torch(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)  # a row of one small number cancels, in both
    x, weight, gradient = (
        torch.randn(size, generator=generator) for size in (shape, shape[-1:], shape)
    )
    results = []
    for function in (
        lambda a, b: rms_norm(a, b, EPS),
        lambda a, b: F.rms_norm(a, b.shape, b, EPS),
    ):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = function(a, b)
        y.backward(gradient)
        results.append((y.detach(), a.grad, b.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_gradients_with_strided_input() -> None:
    whole = torch.randn(3, 2, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda x, w: rms_norm(x[..., 3:9], w, EPS).transpose(0, 1), (whole, weight)
    )


def test_a_row_of_zeros_has_finite_gradients() -> None:
    x = torch.zeros(2, 4, requires_grad=True)
    rms_norm(x, torch.ones(4), EPS).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_bf16_is_torchs() -> None:
    x, weight = torch.randn(4, 8).bfloat16(), torch.ones(8).bfloat16()
    assert torch.equal(rms_norm(x, weight, EPS), F.rms_norm(x, (8,), weight, EPS))
