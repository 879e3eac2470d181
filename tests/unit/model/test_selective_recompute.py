"""Activations that are made again: what autograd keeps, and that nothing else changes."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.model.selective_recompute import recomputable, selective_recompute


def chain(x: Tensor, weights: list[Tensor], *, is_on: bool) -> Tensor:
    """Two activations between three products."""
    with selective_recompute(is_on=is_on):
        for weight in weights:
            x = recomputable(torch.sigmoid, x) @ weight
    return x


@pytest.fixture
def case() -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 8, generator=generator, requires_grad=True)
    return x, [torch.randn(8, 8, generator=generator, requires_grad=True) for _ in range(3)]


def test_gradients_are_the_same_bits(case: tuple[Tensor, list[Tensor]]) -> None:
    x, weights = case
    kept, again = (
        torch.autograd.grad(chain(x, weights, is_on=is_on).square().sum(), (x, *weights))
        for is_on in (False, True)
    )
    assert all(map(torch.equal, kept, again))


def test_the_function_is_called_again_in_the_backward_and_only_there() -> None:
    calls = []

    def double(x: Tensor) -> Tensor:
        calls.append(torch.is_grad_enabled())
        return 2 * x

    x, weight = torch.ones(2, 3, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    with selective_recompute(is_on=True):
        y = recomputable(double, x) @ weight
    assert calls == [True]
    y.sum().backward()
    assert calls == [True, False]
    assert torch.equal(weight.grad, torch.full((3, 4), 4.0))


@pytest.mark.parametrize("is_on", [False, True])
def test_the_result_is_let_go(is_on: bool) -> None:
    """When the forward ends, though autograd holds the hooks until the backward."""
    x, weight = torch.ones(2, 3, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    with selective_recompute(is_on=is_on):
        activated = recomputable(F.silu, x)
        product = activated @ weight
    held = weakref.ref(activated)
    del activated
    assert (held() is None) == is_on
    product.sum().backward()


def test_other_tensors_are_kept(case: tuple[Tensor, list[Tensor]]) -> None:
    """A part of a noted tensor starts where it starts, and is something else."""
    x, (weight, *_) = case
    with selective_recompute(is_on=True):
        activated = recomputable(torch.sigmoid, x)
        y = activated[:3] @ weight
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert torch.equal(gradient, torch.sigmoid(x)[:3].T @ torch.ones(3, 8))
