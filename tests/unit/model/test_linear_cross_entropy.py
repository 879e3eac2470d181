"""The fused loss by itself; tests/parity/test_fused_loss.py has it inside a model."""

import torch

from megatron_ponder.model.linear_cross_entropy import linear_cross_entropy

NUM_TOKENS, HIDDEN, VOCAB_SIZE = 512, 8, 6


class Alone:
    """A process group of one rank."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def weight_gradient(dtype: torch.dtype, chunk_tokens: int) -> torch.Tensor:
    """Of tokens that all pull the same way, so that the sum over chunks grows throughout."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.rand(NUM_TOKENS, 1, HIDDEN, generator=generator).bfloat16().to(dtype)
    weight = torch.randn(VOCAB_SIZE, HIDDEN, generator=generator).bfloat16().to(dtype)
    weight.requires_grad_()
    losses = linear_cross_entropy(
        hidden,
        weight,
        torch.zeros(NUM_TOKENS, 1, dtype=torch.long),
        vocab_size=VOCAB_SIZE,
        tp_group=Alone(),
        sequence_parallel=False,
        chunk_tokens=chunk_tokens,
    )
    losses.sum().backward()
    assert weight.grad.dtype == dtype
    return weight.grad.double()


def test_chunks_are_added_up_in_fp32() -> None:
    """512 summands: a bf16 sum keeps none below 1/512 of itself and ends tens of percent off."""
    expected = weight_gradient(torch.float32, NUM_TOKENS)
    for chunk_tokens in (1, 100, NUM_TOKENS):
        found = weight_gradient(torch.bfloat16, chunk_tokens)
        assert ((found - expected).abs() <= 1e-2 * expected.abs()).all(), chunk_tokens
