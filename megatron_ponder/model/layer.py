"""Transformer layers whose last one works for the slots that are read, and no others.

megatron-core's block hands the same arguments to all its layers and keeps them through
recomputation if they are tensors. So which stages are read travels as a tensor of three numbers, in
the place of the attention mask, which causal attention does not need.

Residual adds and norms are called together where no dropout comes between them, so that kernels can
join them (`kernels.residual`).
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_ponder.kernels.residual import Branch, add_branches
from megatron_ponder.model.norm import add_and_norm, norm_beside_residual, norm_kept
from megatron_ponder.model.output_slots import keep_slots
from megatron_ponder.model.selective_recompute import made_again, remembering_how


class SequentialResidualLayer(TransformerLayer):
    """Llama's and GPT-2's layer: y = x + attention(norm1(x)), then y + mlp(norm2(y)).

    megatron-core's layer computes the same. This one leaves out, in the last layer of the model,
    the work for slots that nobody reads: they are needed as keys and values only. Without dropout
    no mask is drawn, as torch's dropout does at probability 0 too, which costs more than the add.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, None]:
        """Run the layer.

        Args:
            hidden_states: [slots, b, h].
            attention_mask: which stages are read, from `kept_slots`; None: all.
            rotary_pos_emb: from `kernels.rotary.rotary_table`.
            unused: what megatron-core's block passes besides.

        Returns:
            [slots, b, h], or in the last layer [slots that are read, b, h]; and None, as
            megatron-core expects.
        """
        is_selective = self.training and self.config.recompute_granularity == "selective"
        with remembering_how(is_on=is_selective):
            return self._run(hidden_states, self._kept(attention_mask), rotary_pos_emb), None

    def _run(
        self, hidden_states: Tensor, kept: Tensor | None, rotary_pos_emb: Tensor | None
    ) -> Tensor:
        """The layer's output."""
        residual, normed = norm_beside_residual(hidden_states, self.input_layernorm)
        attention = self.self_attention(normed, kept, rotary_pos_emb=rotary_pos_emb)
        residual = keep_slots(residual, kept)
        if self._has_dropout:
            residual = self._add(residual, attention)
            residual, normed = norm_beside_residual(residual, self.pre_mlp_layernorm)
        else:
            residual, normed = add_and_norm(residual, attention, self.pre_mlp_layernorm)
        return self._add(residual, self.mlp(normed))

    def _kept(self, stages: Tensor | None) -> Tensor | None:
        """The stages to keep in this layer: all but in the model's last."""
        return stages if self.layer_number == self.config.num_layers else None

    @property
    def _has_dropout(self) -> bool:
        """Whether branches are dropped from before they are added."""
        return self.training and self.hidden_dropout > 0

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

    Both branches read x, each with its own norm; with fused layers (TransformerEngine) the norms
    are inside the branches' first linear layer and the norm modules here are the identity.
    """

    def _run(
        self, hidden_states: Tensor, kept: Tensor | None, rotary_pos_emb: Tensor | None
    ) -> Tensor:
        norms: list[torch.nn.Module] = [self.input_layernorm, self.pre_mlp_layernorm]
        if kept is None:
            residual, for_attention, for_mlp = norm_beside_residual(hidden_states, *norms)
        else:
            whole, for_attention = norm_beside_residual(hidden_states, norms[0])
            residual = keep_slots(whole, kept)
            for_mlp = made_again(functools.partial(norm_kept, norms[1], kept=kept), whole)
        attention = self.self_attention(for_attention, kept, rotary_pos_emb=rotary_pos_emb)
        return self._add(residual, attention, self.mlp(for_mlp))
