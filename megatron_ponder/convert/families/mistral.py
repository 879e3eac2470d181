"""Mistral, dense: Llama's layer with an optional sliding window."""

import dataclasses

from megatron_ponder.convert.families import llama

FAMILY = dataclasses.replace(
    llama.FAMILY,
    class_name="MistralForCausalLM",
    exported_prefix="PonderMistral",
    defaults=llama.FAMILY.defaults
    | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    uses_window_by_default=True,
    own_keys=frozenset({"sliding_window", "layer_types"}),
    no_effect=frozenset(),
)
