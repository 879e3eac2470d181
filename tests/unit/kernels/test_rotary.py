"""The rotation against complex multiplication, and its own backward against finite differences."""

import pytest
import torch

from megatron_ponder.kernels.dispatch import kernels_chosen
from megatron_ponder.kernels.rotary import rotary_table, split_and_rotate
from tests.unit.kernels.tolerances import DEVICE, FORWARD, GRADIENT, assert_close


def angles_of(num_tokens, r, base=10000.0):
    frequencies = base ** (-torch.arange(r, dtype=torch.float64) / r)
    angles = torch.arange(num_tokens, dtype=torch.float64)[:, None] * frequencies
    return torch.cat((angles, angles), dim=-1)[:, None, None, :]


def turned(x, slots_per_token, r):
    """[slots, b, heads, d] rotated as complex numbers, slot by slot."""
    y = x.clone()
    for slot in range(x.size(0)):
        angles = angles_of(x.size(0), r)[slot // slots_per_token, 0, 0, :r]
        pairs = torch.complex(x[slot, ..., :r], x[slot, ..., r : 2 * r])
        pairs = pairs * torch.polar(torch.ones(r, dtype=torch.float64), angles)
        y[slot, ..., :r], y[slot, ..., r : 2 * r] = pairs.real, pairs.imag
    return y


@pytest.mark.parametrize("slots_per_token", [1, 2, 3])
@pytest.mark.parametrize("d, r", [(8, 4), (8, 1), (6, 2)])
@pytest.mark.parametrize("queries_per_group", [1, 3])
def test_is_a_complex_rotation_at_the_tokens_position(slots_per_token, d, r, queries_per_group):
    num_tokens, groups = 5, 2
    table = rotary_table(angles_of(num_tokens, r), slots_per_token, torch.float64)
    mixed = torch.randn(
        num_tokens * slots_per_token, 2, groups, (queries_per_group + 2) * d, dtype=torch.float64
    )
    query, key, value = split_and_rotate(mixed, table, d)
    parts = mixed.split((queries_per_group * d, d, d), dim=-1)
    heads = [part.reshape(*mixed.shape[:2], -1, d) for part in parts]
    torch.testing.assert_close(query, turned(heads[0], slots_per_token, r))
    torch.testing.assert_close(key, turned(heads[1], slots_per_token, r))
    assert torch.equal(value, heads[2])
    assert torch.equal(query[..., 2 * r :], heads[0][..., 2 * r :])


def test_gradient_with_strided_input_and_gradients():
    table = rotary_table(angles_of(3, 2), 2, torch.float64)
    whole = torch.randn(2, 6, 2, 4 * 6, dtype=torch.float64, requires_grad=True)

    def heads(x):
        # As attention takes them: [b, heads, slots, d].
        parts = split_and_rotate(x.transpose(0, 1), table, 6)
        return tuple(part.permute(1, 2, 0, 3) for part in parts)

    assert torch.autograd.gradcheck(heads, (whole,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_dtype(dtype):
    table = rotary_table(angles_of(4, 2).float(), 1, dtype)
    mixed = torch.randn(4, 1, 2, 12, dtype=dtype)
    assert {part.dtype for part in split_and_rotate(mixed, table, 4)} == {dtype}


def with_gradient(kernels, mixed, slots_per_token, r, d, num_tokens=5):
    """Queries, keys and values as attention would take them, and the projection's gradient."""
    leaf = mixed.clone().requires_grad_()
    with kernels_chosen(kernels):
        # In fp32 in both: torch's table would be rounded to 16 bits.
        angles = angles_of(num_tokens, r).float().to(DEVICE)
        table = rotary_table(angles, slots_per_token, torch.float32)
        parts = split_and_rotate(leaf * 1, table, d)  # not the leaf itself: Triton overwrites
        generator = torch.Generator().manual_seed(4)
        gradients = [
            # Laid out as attention's backward gives them, heads before slots.
            torch.randn(p.permute(1, 2, 0, 3).shape, generator=generator)
            .to(DEVICE, p.dtype)
            .permute(2, 0, 1, 3)
            for p in parts
        ]
        torch.autograd.backward(parts, gradients)
    return [*(part.detach() for part in parts), leaf.grad]


TRITON_SHAPES = [
    # groups, queries per group, d, r, stages
    (3, 1, 8, 4, 1),
    (3, 1, 20, 5, 3),
    (2, 3, 8, 1, 2),
    (1, 2, 6, 3, 2),
    (9, 2, 8, 4, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups, queries_per_group, d, r, slots_per_token", TRITON_SHAPES)
def test_triton_equals_torch(groups, queries_per_group, d, r, slots_per_token, dtype):
    generator = torch.Generator().manual_seed(groups)
    shape = 5 * slots_per_token, 2, groups, (queries_per_group + 2) * d
    mixed = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    ours = with_gradient("triton", mixed, slots_per_token, r, d)
    expected = with_gradient("torch", mixed.float(), slots_per_token, r, d)
    for actual, reference in zip(ours[:3], expected[:3], strict=True):
        assert_close(actual, reference.to(dtype), FORWARD)
    assert_close(ours[3], expected[3].to(dtype), GRADIENT)


def test_triton_takes_positions_of_each_sequence():
    """As decoding does, where sequences of a batch are at different places."""
    generator = torch.Generator().manual_seed(2)
    mixed = torch.randn(2, 3, 2, 24, generator=generator).to(DEVICE)
    whole = rotary_table(angles_of(9, 4).float().to(DEVICE), 1, torch.float32)
    positions = torch.tensor([[0, 1], [7, 8], [3, 4]], device=DEVICE)  # [b, slots]
    table = whole[:, positions, 0].transpose(1, 2)  # [2, b, slots, 1, r] -> [2, slots, b, 1, r]
    expected = split_and_rotate(mixed.clone(), table, 8)
    with kernels_chosen("triton"):
        found = split_and_rotate(mixed, table, 8)
    for actual, reference in zip(found, expected, strict=True):
        assert_close(actual, reference, FORWARD)


def test_triton_rotates_in_place_where_heads_have_one_stride():
    mixed = torch.randn(4, 1, 3, 24, device=DEVICE)
    with kernels_chosen("triton"):
        table = rotary_table(angles_of(4, 4).float().to(DEVICE), 1, torch.float32)
        parts = split_and_rotate(mixed, table, 8)
    storages = {part.untyped_storage().data_ptr() for part in parts}
    assert storages == {mixed.untyped_storage().data_ptr()}


def test_a_position_per_slot_is_caught():
    mixed = torch.randn(10, 1, 1, 24, device=DEVICE)
    right = with_gradient("torch", mixed, 2, 4, 8)
    wrong = with_gradient("triton", mixed, 1, 4, 8, num_tokens=10)
    with pytest.raises(AssertionError):
        assert_close(wrong[0], right[0], FORWARD)
