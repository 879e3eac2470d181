"""The MLPs of Llama, GPT-NeoX and GPT-2 on this package's activation kernels.

megatron-core's fused GELU is the tanh form only, and composed activations, its default, move and
keep more than ours.
"""

import functools
from typing import Any

from megatron.core.transformer.mlp import MLP
from torch import Tensor

from megatron_ponder.kernels.dispatch import uses_triton
from megatron_ponder.kernels.gelu import gelu
from megatron_ponder.kernels.swiglu import swiglu
from megatron_ponder.model.selective_recompute import recomputable


class SwigluMLP(MLP):
    """megatron-core's MLP, down(silu(gate(x)) * up(x)).

    megatron-core computes gate and up in one matmul, [.., 2f], and composes the activation from
    chunks, which keeps twice as many activations for the backward.
    """

    def forward(
        self, hidden_states: Tensor, *unused: Any, **more: Any
    ) -> tuple[Tensor, Tensor | None]:
        """[slots, b, h] -> [slots, b, h], and the bias that the caller adds (None without)."""
        assert not any(unused) and not any(more.values()), (unused, more)
        gate_and_up, bias = self.linear_fc1(hidden_states)
        gate_and_up = gate_and_up if bias is None else gate_and_up + bias
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(recomputable(swiglu, gate_and_up))
        return output


class GeluMLP(MLP):
    """megatron-core's MLP, down(gelu(up(x) + bias)), exact."""

    is_tanh = False

    def forward(
        self, hidden_states: Tensor, *unused: Any, **more: Any
    ) -> tuple[Tensor, Tensor | None]:
        """As SwigluMLP's."""
        assert not any(unused) and not any(more.values()), (unused, more)
        up, bias = self.linear_fc1(hidden_states)
        if bias is not None and not uses_triton():
            # torch keeps the sum for the activation's backward; recompute starts from it too.
            up, bias = up + bias, None
        activate = functools.partial(gelu, bias=bias, is_tanh=self.is_tanh)
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(recomputable(activate, up))
        return output


class TanhGeluMLP(GeluMLP):
    """The same by the tanh approximation."""

    is_tanh = True
