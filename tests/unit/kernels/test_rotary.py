"""The rotation against complex multiplication, and its own backward against finite differences."""

import pytest
import torch

from megatron_ponder.kernels.rotary import apply_rotary, rotary_table


def angles_of(num_tokens, r, base=10000.0):
    frequencies = base ** (-torch.arange(r, dtype=torch.float64) / r)
    angles = torch.arange(num_tokens, dtype=torch.float64)[:, None] * frequencies
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]


@pytest.mark.parametrize("num_stages", [1, 2, 3])
@pytest.mark.parametrize("d, r", [(8, 4), (8, 1), (6, 2)])
def test_is_a_complex_rotation_at_the_tokens_position(num_stages, d, r):
    num_tokens = 5
    table = rotary_table(angles_of(num_tokens, r), num_stages, torch.float64)
    x = torch.randn(num_tokens * num_stages, 2, 3, d, dtype=torch.float64)
    y = apply_rotary(x, table)
    for slot in range(x.size(0)):
        turn = torch.polar(
            torch.ones(r, dtype=torch.float64),
            angles_of(num_tokens, r)[slot // num_stages, 0, 0, :r],
        )
        turned = torch.complex(x[slot, ..., :r], x[slot, ..., r : 2 * r]) * turn
        torch.testing.assert_close(y[slot, ..., :r], turned.real)
        torch.testing.assert_close(y[slot, ..., r : 2 * r], turned.imag)
    assert torch.equal(y[..., 2 * r :], x[..., 2 * r :])


def test_gradient_and_strided_input():
    table = rotary_table(angles_of(3, 2), 2, torch.float64)
    whole = torch.randn(6, 2, 3, 3 * 6, dtype=torch.float64, requires_grad=True)

    def rotate_slice(x):
        return apply_rotary(x[..., 6:12], table)

    assert torch.autograd.gradcheck(rotate_slice, (whole,))
    assert rotate_slice(whole).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_dtype(dtype):
    table = rotary_table(angles_of(4, 2).float(), 1, dtype)
    x = torch.randn(4, 1, 2, 4, dtype=dtype)
    assert apply_rotary(x, table).dtype == dtype
