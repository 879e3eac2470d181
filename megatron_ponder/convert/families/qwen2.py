"""Qwen2, dense: Llama's layer with biases of queries, keys and values."""

import dataclasses

from megatron_ponder.convert.families import llama

FAMILY = dataclasses.replace(
    llama.FAMILY,
    class_name="Qwen2ForCausalLM",
    exported_prefix="PonderQwen2",
    settings=llama.FAMILY.settings | {"add_qkv_bias": True},
    defaults=llama.FAMILY.defaults | {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    own_keys=frozenset({"sliding_window", "use_sliding_window", "layer_types"}),
    no_effect=frozenset({"max_window_layers"}),
)
