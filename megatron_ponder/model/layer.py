"""Transformer layers whose last one works for the slots that are read, and no others.

megatron-core's block hands the same arguments to all its layers and keeps them through
recomputation if they are tensors. So which stages are read travels as a tensor of three numbers, in
the place of the attention mask, which causal attention does not need.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_ponder.model.norm import norm_kept
from megatron_ponder.model.recomputation import made_again, remembering_how
from megatron_ponder.model.stages import keep_stages

OutputAndBias = tuple[Tensor, Tensor | None]


def get_bias_dropout_add(training: bool, fused: bool) -> Callable[..., Tensor]:
    """Residual + dropout(x + bias), as megatron-core's function of this name.

    Other than there, no mask is drawn without dropout: torch's dropout does that at probability 0
    too, which costs more than the add.

    Args:
        training: whether dropout applies.
        fused: ignored; there is one implementation.

    Returns:
        A function of (x, bias or None), residual, probability; all tensors [s, b, h], bias [h].
    """

    def bias_dropout_add(x_with_bias: OutputAndBias, residual: Tensor, prob: float) -> Tensor:
        x, bias = x_with_bias
        if bias is not None:
            x = x + bias
        if training and prob > 0:
            x = F.dropout(x, p=prob)
        return residual + x

    return bias_dropout_add


class SequentialResidualLayer(TransformerLayer):
    """Llama's and GPT-2's layer: y = x + attention(norm1(x)), then y + mlp(norm2(y)).

    megatron-core's layer computes the same. This one leaves out, in the last layer of the model,
    the work for slots that nobody reads: they are needed as keys and values only.
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
            attention_mask: which stages are read, from `kept_stages`; None: all.
            rotary_pos_emb: from `kernels.rotary.rotary_table`.
            unused: what megatron-core's block passes besides.

        Returns:
            [slots, b, h], or in the last layer [slots that are read, b, h]; and None, as
            megatron-core expects.
        """
        with remembering_how(is_on=self._is_selective):
            return self._run(hidden_states, self._kept(attention_mask), rotary_pos_emb), None

    def _run(
        self, hidden_states: Tensor, kept: Tensor | None, rotary_pos_emb: Tensor | None
    ) -> Tensor:
        """The layer's output."""
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        normed = made_again(self.input_layernorm, hidden_states)
        attention = self.self_attention(normed, kept, rotary_pos_emb=rotary_pos_emb)
        hidden_states = add(attention, keep_stages(hidden_states, kept), self.hidden_dropout)
        mlp = self.mlp(made_again(self.pre_mlp_layernorm, hidden_states))
        return add(mlp, hidden_states, self.hidden_dropout)

    @property
    def _is_selective(self) -> bool:
        """Whether activations that are cheap to make again are not kept."""
        return self.training and self.config.recompute_granularity == "selective"

    def _kept(self, stages: Tensor | None) -> Tensor | None:
        """The stages to keep in this layer: all but in the model's last."""
        return stages if self.layer_number == self.config.num_layers else None


class ParallelResidualLayer(SequentialResidualLayer):
    """GPT-NeoX's layer: y = x + attention(norm1(x)) + mlp(norm2(x)).

    Both branches read x, each with its own norm; with fused layers (TransformerEngine) the norms
    are inside the branches' first linear layer and the norm modules here are the identity.
    """

    def _run(
        self, hidden_states: Tensor, kept: Tensor | None, rotary_pos_emb: Tensor | None
    ) -> Tensor:
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        normed = made_again(self.input_layernorm, hidden_states)
        attention = self.self_attention(normed, kept, rotary_pos_emb=rotary_pos_emb)
        norm = functools.partial(norm_kept, self.pre_mlp_layernorm, kept=kept)
        mlp = self.mlp(made_again(norm, hidden_states))
        residual = keep_stages(hidden_states, kept)
        with_attention = add(attention, residual, self.hidden_dropout)
        return add(mlp, with_attention, self.hidden_dropout)
