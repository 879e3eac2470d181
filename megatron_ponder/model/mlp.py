"""The gated MLP of Llama on this package's activation kernel."""

from typing import Any

from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_ponder.kernels.swiglu import swiglu
from megatron_ponder.model.recomputation import made_again


class SwigluMLP(MLP):
    """megatron-core's MLP, down(silu(gate(x)) * up(x)).

    megatron-core computes gate and up as one product, [.., 2f], and composes the activation of
    chunks, which keeps twice as many activations for the backward.
    """

    def forward(
        self, hidden_states: Tensor, *unused: Any, **more: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[slots, b, h] -> [slots, b, h], and the bias that the caller adds (None without)."""
        assert not any(unused) and not any(more.values()), (unused, more)
        gate_and_up, bias = self.linear_fc1(hidden_states)
        gate_and_up = gate_and_up if bias is None else gate_and_up + bias
        return self.linear_fc2(made_again(swiglu, gate_and_up))
