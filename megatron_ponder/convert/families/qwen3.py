"""Qwen3, dense: Llama's layer with norms of each head's queries and keys."""

import dataclasses

from megatron_ponder.convert.families import llama

FAMILY = dataclasses.replace(
    llama.FAMILY,
    class_name="Qwen3ForCausalLM",
    exported_prefix="PonderQwen3",
    settings=llama.FAMILY.settings | {"qk_layernorm": True},
    defaults=llama.FAMILY.defaults
    | {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    own_keys=frozenset({"sliding_window", "use_sliding_window", "layer_types", "attention_bias"}),
    no_effect=frozenset({"max_window_layers"}),
)
