"""Norms as modules: their parameters are complete before a fused kernel takes them."""

import pytest
import torch

from megatron_ponder.model.norm import LayerNorm, RMSNorm, add_and_norm, norm_beside_residual


def gather_late(norm: torch.nn.Module) -> None:
    """Complete the weight where megatron-core does with --overlap-param-gather: before a call."""
    gathered = norm.weight.detach().clone()
    norm.weight.data.fill_(float("nan"))
    norm.register_forward_pre_hook(lambda module, _: module.weight.data.copy_(gathered))


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("is_added", [False, True], ids=["beside residual", "add and norm"])
def test_parameters_are_gathered_before_a_fused_norm(
    kind: type[RMSNorm | LayerNorm], is_added: bool
) -> None:
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    norm = kind(8, eps=1e-5)
    expected = norm(x)
    gather_late(norm)
    _, normed = (
        add_and_norm(x / 2, (x / 2, None), norm) if is_added else norm_beside_residual(x, norm)
    )
    torch.testing.assert_close(normed, expected)
