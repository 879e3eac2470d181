"""Attention over the interleaved slots: plain causal, on torch's scaled_dot_product_attention.

megatron-core's own unfused core attention materialises the score matrix and draws dropout from the
CUDA generator. This one runs on every device and lets torch choose the kernel. Nothing here
depends on thoughts; what the slots of a token share is in the rotary table.

Under context parallelism a rank has the queries of two chunks of the sequence and gathers the keys
and values of all; each chunk attends to what lies before it. During generation a cache
(`model.cache`) puts the keys and values of earlier slots before those that are given.
"""

import copy
import math
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import CausalBias, causal_lower_right

from megatron_ponder.kernels.rotary import split_and_rotate
from megatron_ponder.model.cache import KeyValueCache
from megatron_ponder.model.context_parallel import chunks_of, gather_sequence
from megatron_ponder.model.output_slots import select_outputs
from megatron_ponder.model.selective_recompute import recomputable
from megatron_ponder.ponder.plan import Pass


class SdpaCoreAttention(torch.nn.Module):
    """softmax(Q K^T / sqrt(d), causal) V, with grouped key/value heads.

    Built and called by megatron-core's SelfAttention with the arguments of its DotProductAttention.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert pg_collection is not None
        self.cp_group = pg_collection.cp if config.context_parallel_size > 1 else None
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self"
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.layer_number = layer_number
        self.cache: KeyValueCache | None = None
        """Keys and values of earlier slots, during generation."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: object | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s, b, heads, d], this rank's heads.
            key: [s, b, groups, d], groups dividing heads.
            value: [s, b, groups, d].
            attention_mask: None; causality is built in.
            attn_mask_type: causal.
            attention_bias: None.
            packed_seq_params: None; one sequence per row.

        Returns:
            [s, b, heads * d].
        """
        assert attention_mask is None and attention_bias is None and packed_seq_params is None
        if self.cache is not None:
            return self._attend(query, *self.cache.extend(self.layer_number, key, value))
        if self.cp_group is None:
            return self._attend(query, key, value)
        d = key.size(-1)
        key, value = gather_sequence(torch.cat((key, value), dim=-1), self.cp_group).split(d, -1)
        num_chunk_slots = query.size(0) // 2
        chunks = chunks_of(self.cp_group.rank(), self.cp_group.size())
        ends = [num_chunk_slots * (chunk + 1) for chunk in chunks]
        return torch.cat(
            [
                self._attend(part, key[:end], value[:end])
                for part, end in zip(query.chunk(2), ends, strict=True)
            ]
        )

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | CausalBias | None = None
    ) -> Tensor:
        """Causal attention of the last slots of a sequence: [q, b, heads, d] -> [q, b, heads * d].

        Key and value are [k, b, groups, d], k >= q. The last query is at the last key, unless a
        mask [b, 1, q, k] says which keys each query sees.
        """
        s, b, heads, d = query.shape
        # A single query at the end attends to every key and needs no mask.
        if mask is None and 1 < s < key.size(0):
            mask = causal_lower_right(s, key.size(0))
        # [s, b, heads, d] -> [b, heads, s, d], a view
        query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        # Each tensor-parallel rank holds other heads and needs other masks.
        rng = tensor_parallel.get_cuda_rng_tracker().fork() if dropout else nullcontext()
        with rng:
            context = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=mask is None and s > 1,
                scale=self.softmax_scale,
                enable_gqa=key.size(1) < heads,
            )
        return recomputable(_slots_first, context)


def _slots_first(context: Tensor) -> Tensor:
    """[b, heads, s, d] -> [s, b, heads * d]."""
    return context.permute(2, 0, 1, 3).flatten(2)


class RotarySelfAttention(SelfAttention):
    """megatron-core's self-attention for training, rotating by a table made once per pass.

    megatron-core's own forward computes cosines and sines in every layer and serves caches, flash
    decoding and packed sequences besides.

    Args:
        config: megatron-core's config.
        add_attention_bias: biases in both projections, where the config has none anywhere.
        arguments: the base class's.
    """

    def __init__(
        self, config: TransformerConfig, *, add_attention_bias: bool = False, **arguments: Any
    ) -> None:
        if add_attention_bias:
            # megatron-core has one switch for the biases of attention and MLP.
            config = copy.copy(config)
            config.add_bias_linear = True
        super().__init__(config, **arguments)

    def forward(
        self,
        hidden_states: Tensor,
        outputs_of: Pass | None,
        rotary_pos_emb: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend and project.

        Args:
            hidden_states: [slots, b, h] (this rank's slots under sequence parallelism).
            outputs_of: the pass at whose output slots to project; None: at all slots.
            rotary_pos_emb: from `kernels.rotary.rotary_table`; None without rotary positions.

        Returns:
            [slots, b, h], or [output slots, b, h]; and the bias that the caller adds (None without
            biases).
        """
        if rotary_pos_emb is None:
            query, key, value = self.get_query_key_value_tensors(hidden_states)
        else:
            mixed, _ = self.get_query_key_value_tensors(hidden_states, split_qkv=False)
            if self.q_layernorm is not None:
                mixed = self._norm_heads(mixed)
            query, key, value = split_and_rotate(
                mixed, rotary_pos_emb, self.hidden_size_per_attention_head
            )
        context = self.core_attention(
            query, key, value, attention_mask=None, attn_mask_type=AttnMaskType.causal
        )
        output, bias = self.linear_proj(select_outputs(context, outputs_of))
        return output, bias

    def _norm_heads(self, mixed: Tensor) -> Tensor:
        """Queries and keys normed, each head by itself: [slots, b, groups, (n + 2) * d], both."""
        # [slots, b, groups, (n + 2) * d] -> [slots, b, groups, n + 2, d]
        by_head = mixed.unflatten(-1, (-1, self.hidden_size_per_attention_head))
        query, key, value = by_head.split((by_head.size(-2) - 2, 1, 1), dim=-2)
        normed = (self.q_layernorm(query), self.k_layernorm(key), value)
        return torch.cat(normed, dim=-2).flatten(-2)
