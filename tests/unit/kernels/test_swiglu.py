"""SwiGLU against its composition, its own backward against finite differences."""

import pytest
import torch
import torch.nn.functional as F

from megatron_ponder.kernels.swiglu import swiglu


def composed(x: torch.Tensor) -> torch.Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 2, 8), (5, 2), (1, 1, 6), (0, 4)])
def test_equals_the_composition(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    gradient = torch.randn(*shape[:-1], shape[-1] // 2).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = swiglu(ours), composed(theirs)
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
