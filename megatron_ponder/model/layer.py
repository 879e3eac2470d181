"""Transformer layers; the model's last one computes the output slots of the pass, and no others.

Slots that are not output slots serve the last layer as keys and values only. Residual adds and
norms are called together where no dropout comes between them, so that kernels can fuse them
(`kernels.residual`).
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_ponder.kernels.operands import Branch
from megatron_ponder.kernels.residual import add_branches
from megatron_ponder.model.norm import add_and_norm, norm_beside_residual, norm_output_slots
from megatron_ponder.model.output_slots import select_outputs
from megatron_ponder.model.selective_recompute import recomputable, selective_recompute
from megatron_ponder.ponder.plan import Pass


class SequentialResidualLayer(TransformerLayer):
    """Llama's and GPT-2's layer: y = x + attention(norm1(x)), then y + mlp(norm2(y)).

    megatron-core's layer computes the same for all slots. Without dropout this one draws no mask;
    torch's dropout draws one even at probability 0, at a higher cost than the add.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: Pass | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Run the layer.

        Args:
            hidden_states: [slots, b, h].
            attention_mask: None; attention is causal.
            rotary_pos_emb: from `kernels.rotary.rotary_table`.
            packed_seq_params: the pass that runs (`model.output_slots` says why here); None: every
                slot is an output slot.
            unused: the block's other arguments.

        Returns:
            [slots, b, h], or in the last layer [output slots, b, h]; and None, as megatron-core
            expects.
        """
        is_selective = self.training and self.config.recompute_granularity == "selective"
        outputs_of = self._outputs_of(packed_seq_params)
        with selective_recompute(is_on=is_selective):
            return self._run(hidden_states, outputs_of, rotary_pos_emb), None

    def _run(
        self, hidden_states: Tensor, outputs_of: Pass | None, rotary_pos_emb: Tensor | None
    ) -> Tensor:
        """The layer's output, at the output slots of a pass or at all slots."""
        residual, normed = norm_beside_residual(hidden_states, self.input_layernorm)
        attention = self.self_attention(normed, outputs_of, rotary_pos_emb)
        residual = select_outputs(residual, outputs_of)
        if self._has_dropout:
            residual = self._add(residual, attention)
            residual, normed = norm_beside_residual(residual, self.pre_mlp_layernorm)
        else:
            residual, normed = add_and_norm(residual, attention, self.pre_mlp_layernorm)
        return self._add(residual, self.mlp(normed))

    def _outputs_of(self, pass_: Pass | None) -> Pass | None:
        """The pass, if this layer leaves out slots of it; None if it computes all slots."""
        is_last = self.layer_number == self.config.num_layers
        if not is_last or pass_ is None or pass_.outputs_per_token == pass_.slots_per_token:
            return None
        return pass_

    @property
    def _has_dropout(self) -> bool:
        """Whether dropout acts on branches before they are added."""
        return self.training and bool(self.hidden_dropout > 0)

    def _add(self, residual: Tensor, *branches: Branch) -> Tensor:
        """Residual + the sum of dropout(branch + bias), all [s, b, h]."""
        if not self._has_dropout:
            return add_branches(residual, *branches)
        for x, bias in branches:
            x = x if bias is None else x + bias
            residual = residual + F.dropout(x, p=self.hidden_dropout)
        return residual


class ParallelResidualLayer(SequentialResidualLayer):
    """GPT-NeoX's layer: y = x + attention(norm1(x)) + mlp(norm2(x)).

    Each branch has its own norm of x. In TransformerEngine's layers the norms are inside the first
    linear layer of each branch, and the norm modules here are the identity.
    """

    def _run(
        self, hidden_states: Tensor, outputs_of: Pass | None, rotary_pos_emb: Tensor | None
    ) -> Tensor:
        norms: list[torch.nn.Module] = [self.input_layernorm, self.pre_mlp_layernorm]
        if outputs_of is None:
            residual, for_attention, for_mlp = norm_beside_residual(hidden_states, *norms)
        else:
            whole, for_attention = norm_beside_residual(hidden_states, norms[0])
            residual = select_outputs(whole, outputs_of)
            for_mlp = recomputable(
                functools.partial(norm_output_slots, norms[1], outputs_of), whole
            )
        attention = self.self_attention(for_attention, outputs_of, rotary_pos_emb)
        return self._add(residual, attention, self.mlp(for_mlp))
