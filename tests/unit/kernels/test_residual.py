"""Adds and norms of the residual stream: Triton's forms and torch's against plain operations."""

import functools

import pytest
import torch

from megatron_ponder.kernels.dispatch import kernels_chosen
from megatron_ponder.kernels.residual import add_and_norm, add_branches, norm_beside_residual
from megatron_ponder.kernels.triton import norm
from tests.reference import kernels as reference
from tests.unit.kernels.tolerances import DEVICE, FORWARD, GRADIENT, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = 1e-5
SHAPES = [(5, 2, 24), (3, 1, 7), (1, 1, 3), (13, 2, 5), (2, 1, 1100)]
"""Slots, batch, hidden."""
NORMS = pytest.mark.parametrize("is_layer_norm", [False, True], ids=["RMSNorm", "LayerNorm"])


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """So that a program of the backward takes rows several times, and the last one fewer."""
    monkeypatch.setattr(norm, "MAX_WARPS", 16)
    block = norm._block
    monkeypatch.setattr(norm, "_block", lambda width: block(width) | {"ROWS": 2})


def plain_add_and_norm(x, y, c, weight, bias, written=None):
    """The norm is of the row as it is written, where that is given: rounded to 16 bits.

    A row of few and close numbers is another one when it is rounded, and its norm still more so.
    """
    total = reference.add(x, y, c)
    rounded = total if written is None else total + (written - total).detach()
    return total, reference.norm(rounded, weight, bias, EPS)


def in_pairs(tensors):
    return list(zip(tensors[::2], tensors[1::2], strict=True))


OURS = {
    "add": lambda x, *branches: (add_branches(x, *in_pairs(branches)),),
    "norm": lambda x, *norms: norm_beside_residual(x, *in_pairs(norms), eps=EPS),
    "add and norm": lambda x, y, c, *norm: add_and_norm(x, (y, c), norm, eps=EPS),
}
PLAIN = {
    "add": lambda x, *branches: (reference.add(x, *branches),),
    "norm": lambda x, *norms: (x * 1, *(reference.norm(x, *norm, EPS) for norm in in_pairs(norms))),
    "add and norm": lambda x, y, c, *norm: plain_add_and_norm(x, y, c, *norm),
}


def inputs(shape, dtype, kinds):
    """x: a stream or a branch. c: a bias. w: a norm's weight. A dot: nothing."""
    generator = torch.Generator().manual_seed(sum(shape) + len(kinds))
    h = shape[-1]
    make = {
        "x": lambda: torch.randn(shape, generator=generator).add_(0.3),
        "c": lambda: torch.randn(h, generator=generator),
        "w": lambda: torch.rand(h, generator=generator).add_(0.5),
        ".": lambda: None,
    }
    made = [make[kind]() for kind in kinds]
    return [None if t is None else t.to(DEVICE, dtype) for t in made]


def results(function, given, kernels="torch"):
    """Outputs, and gradients of all inputs."""
    leaves = [None if t is None else t.clone().requires_grad_() for t in given]
    generator = torch.Generator().manual_seed(3)
    with kernels_chosen(kernels):
        outputs = function(*leaves)
        gradients = [
            torch.randn(y.shape, generator=generator).to(y.device, torch.bfloat16).to(y.dtype)
            for y in outputs
        ]
        torch.autograd.backward(outputs, gradients)
    return [y.detach() for y in outputs], [leaf.grad for leaf in leaves if leaf is not None]


def check(name, given, kernels):
    dtype = given[0].dtype
    outputs, gradients = results(OURS[name], given, kernels)
    in_fp32 = [None if t is None else t.float() for t in given]
    plain = PLAIN[name]
    if name == "add and norm":
        plain = functools.partial(plain_add_and_norm, written=outputs[0].float())
    expected, expected_gradients = results(plain, in_fp32)
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_close(actual, wanted.to(dtype), FORWARD)
    for actual, wanted in zip(gradients, expected_gradients, strict=True):
        assert_close(actual, wanted.to(dtype), GRADIENT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kinds", ["xx.", "xxc", "xxcxc", "xx.x.", "xxcx.", "xx.xc"])
@pytest.mark.parametrize("shape", SHAPES)
def test_adds_in_triton(shape, kinds, dtype):
    check("add", inputs(shape, dtype, kinds), "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@NORMS
@pytest.mark.parametrize("num_norms", [1, 2])
@pytest.mark.parametrize("shape", SHAPES)
def test_norms_beside_the_residual_in_triton(shape, num_norms, is_layer_norm, dtype):
    kinds = "x" + num_norms * ("wc" if is_layer_norm else "w.")
    check("norm", inputs(shape, dtype, kinds), "triton")


@pytest.mark.parametrize("dtype", DTYPES)
@NORMS
@pytest.mark.parametrize("bias", [".", "c"])
@pytest.mark.parametrize("shape", SHAPES)
def test_adds_with_norms_in_triton(shape, bias, is_layer_norm, dtype):
    check("add and norm", inputs(shape, dtype, "xx" + bias + "w" + ".c"[is_layer_norm]), "triton")


@pytest.mark.parametrize(
    "name, kinds",
    [
        ("add", "xxcxc"),
        ("add", "xxcx."),
        ("norm", "xwcwc"),
        ("norm", "xw.w."),
        ("add and norm", "xxcwc"),
        ("add and norm", "xx.w."),
    ],
)
def test_torch_forms(name, kinds):
    check(name, inputs((5, 2, 24), torch.float32, kinds), "torch")


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_strided_inputs_and_gradients(kernels):
    x, y, w, c = inputs((3, 2, 12), torch.float32, "xxwc")
    x, y, w, c = x[..., 2:10].transpose(0, 1), y[..., 1:9].transpose(0, 1), w[:8], c[:8]

    def turned(name):
        functions = OURS if name == "ours" else PLAIN
        return lambda *given: [part.permute(2, 0, 1) for part in functions["add and norm"](*given)]

    given = [x, y, c, w, c]
    ours, expected = results(turned("ours"), given, kernels), results(turned("plain"), given)
    for actual, wanted in zip(ours[0] + ours[1], expected[0] + expected[1], strict=True):
        assert_close(actual, wanted, GRADIENT)


def test_a_forgotten_residual_gradient_is_caught():
    given = inputs((5, 2, 24), torch.float32, "xwc")
    _, right = results(PLAIN["norm"], given)
    _, wrong = results(lambda x, *norm: OURS["norm"](x, *norm)[1:], given, "triton")
    with pytest.raises(AssertionError):
        assert_close(wrong[0], right[0], GRADIENT)
