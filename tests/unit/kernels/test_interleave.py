"""Slots from tokens and thoughts: the definitions, and Triton against torch with gradients."""

import pytest
import torch

from megatron_ponder.kernels.dispatch import kernels_chosen
from megatron_ponder.kernels.interleave import embed_and_interleave, interleave, select_slots
from tests.unit.kernels.tolerances import DEVICE, FORWARD, GRADIENT, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(5, 2, 12, 1), (5, 2, 12, 2), (3, 1, 7, 3), (1, 3, 33, 4), (70, 1, 5, 2)]
"""Tokens, batch, hidden, stages."""
V, FIRST_ROW = 11, 4


def randn(*shape, seed, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def token_ids(b, s):
    """Of this rank, of others, and one id in more than half of all places."""
    ids = torch.randint(0, V + FIRST_ROW + 3, (b, s), generator=torch.Generator().manual_seed(7))
    return torch.where(torch.arange(s) % 5 < 3, FIRST_ROW + 2, ids).to(DEVICE)


def with_gradients(function, *inputs, seed=9):
    """Result and gradients, all detached."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    y.backward(randn(*y.shape, seed=seed, dtype=y.dtype))
    return [y.detach(), *(leaf.grad for leaf in leaves)]


def compare(function, *inputs):
    results = {}
    for kernels in ("torch", "triton"):
        with kernels_chosen(kernels):
            results[kernels] = with_gradients(function, *inputs)
    return list(zip(results["triton"], results["torch"], strict=True))


@pytest.mark.parametrize("scale", [None, 3.5])
@pytest.mark.parametrize("s, b, h, n", SHAPES)
def test_embed_and_interleave_is_its_formula(s, b, h, n, scale):
    weight = randn(V, h, seed=1, dtype=torch.float64)
    thoughts = randn(s * (n - 1), b, h, seed=2, dtype=torch.float64) if n > 1 else None
    ids = token_ids(b, s)
    out = embed_and_interleave(ids, weight, thoughts, scale=scale, first_row=FIRST_ROW)
    for slot in range(s * n):
        for row in range(b):
            t, j = divmod(slot, n)
            local = int(ids[row, t]) - FIRST_ROW
            expected = torch.zeros(h, dtype=torch.float64, device=DEVICE)
            if j > 0:
                expected = thoughts[t * (n - 1) + j - 1, row]
            elif 0 <= local < V:
                expected = weight[local] * (scale or 1.0)
            assert torch.equal(out[slot, row], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("s, b, h, n", SHAPES)
def test_embed_and_interleave(s, b, h, n, dtype):
    weight = randn(V, h, seed=1, dtype=dtype)
    ids = token_ids(b, s)
    inputs = [weight] if n == 1 else [weight, randn(s * (n - 1), b, h, seed=2, dtype=dtype)]

    def embed(weight, thoughts=None):
        return embed_and_interleave(ids, weight, thoughts, scale=3.5, first_row=FIRST_ROW)

    (y, expected), (d_weight, d_expected), *d_thoughts = compare(embed, *inputs)
    assert_close(y, expected, FORWARD)
    # torch adds up 16-bit gradients in the dtype: one rounding per token of the same id.
    if dtype == torch.float32:
        assert_close(d_weight, d_expected, GRADIENT)
    else:
        in_fp32 = with_gradients(embed, *(x.float() for x in inputs))[1]
        assert_close(d_weight, in_fp32.to(dtype), GRADIENT)
    for ours, theirs in d_thoughts:
        assert torch.equal(ours, theirs)


def test_gradient_is_the_same_in_every_run():
    ids, weight = token_ids(2, 90), randn(V, 6, seed=1, dtype=torch.float32)

    def embed(weight):
        return embed_and_interleave(ids, weight, None, scale=2.0, first_row=FIRST_ROW)

    with kernels_chosen("triton"):
        first, second = (with_gradients(embed, weight)[1] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("s, b, h, n", [shape for shape in SHAPES if shape[3] > 1])
def test_interleave(s, b, h, n, dtype):
    tokens = randn(s, b, h, seed=1, dtype=dtype)
    thoughts = randn(s * (n - 1), b, h, seed=2, dtype=dtype)
    for ours, theirs in compare(interleave, tokens, thoughts):
        assert torch.equal(ours, theirs)


def test_interleave_takes_strided_tensors():
    tokens = randn(2, 5, 6, seed=1, dtype=torch.float32).transpose(0, 1)
    thoughts = randn(2, 10, 6, seed=2, dtype=torch.float32).transpose(0, 1).contiguous()
    for ours, theirs in compare(interleave, tokens, thoughts):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stages", [range(1), range(1, 3), range(2, 3), range(3)])
def test_select_stages(stages, dtype):
    hidden = randn(12, 2, 7, seed=1, dtype=dtype)
    for ours, theirs in compare(lambda x: select_slots(x, 3, stages), hidden):
        assert torch.equal(ours, theirs)


def test_a_thought_at_the_wrong_token_is_caught():
    tokens, thoughts = (randn(4, 1, 3, seed=i, dtype=torch.float32) for i in (1, 2))
    with kernels_chosen("triton"):
        wrong = interleave(tokens, thoughts.roll(1, dims=0))
    with pytest.raises(AssertionError):
        assert_close(wrong, interleave(tokens, thoughts), FORWARD)
