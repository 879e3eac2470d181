"""What GPT-NeoX and a dropout-free residual stream need beyond megatron-core's TransformerLayer."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

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


class ParallelResidualLayer(TransformerLayer):
    """GPT-NeoX's layer: y = x + attention(norm1(x)) + mlp(norm2(x)).

    Both branches read x, each with its own norm; with fused layers (TransformerEngine) the norms
    are inside the branches' first linear layer and the norm modules here are the identity.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Run the layer on [s, b, h]; returns ([s, b, h], None), as megatron-core expects."""
        add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
        attention = self.self_attention(
            self.input_layernorm(hidden_states),
            attention_mask=attention_mask,
            rotary_pos_emb=rotary_pos_emb,
        )
        mlp = self.mlp(self.pre_mlp_layernorm(hidden_states))
        with_attention = add(attention, hidden_states, self.hidden_dropout)
        return add(mlp, with_attention, self.hidden_dropout), None
