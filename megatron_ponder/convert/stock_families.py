"""The stock Hugging Face classes that we convert from and to: which keys they read, and as what.

Facts about transformers, as data; config_mapping.py applies them. Imports no torch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_ponder.errors import ConversionError

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A stock class: which keys it reads, and what they mean here."""

    class_name: str
    """Of the stock model."""
    settings: dict[str, Any]
    """Settings that no key changes."""
    keys: dict[str, str]
    """Our settings by name, and the key of each."""
    defaults: dict[str, Any]
    """What the stock class takes for a key that is left out; keys that are not here are needed."""
    activation_key: str = "hidden_act"
    activations: dict[str, str]
    """Values of that key, and our names."""
    tied_by_default: bool = False
    rotary_base_key: str | None = "rope_theta"
    """None: positions are learned."""
    rotary_percent_key: str | None = None
    """None: all channels are rotated."""
    must_be: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    """Keys that other values give another computation, and the values that do not."""
    no_effect: frozenset[str] = frozenset()
    """Further keys that the numbers do not depend on."""


_LLAMA_SETTINGS = {
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "parallel_residual": False,
    "rotary_percent": 1.0,
    "add_bias_linear": False,
    "add_attention_bias": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
}
_SHAPE_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "init_method_std": "initializer_range",
}
_LLAMA_KEYS = _SHAPE_KEYS | {
    "num_query_groups": "num_key_value_heads",
    "kv_channels": "head_dim",
    "norm_epsilon": "rms_norm_eps",
}
_LLAMA_DEFAULTS = {
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "num_key_value_heads": None,
    "head_dim": None,
    "rms_norm_eps": 1e-6,
}
_SWIGLU = {"silu": "swiglu", "swish": "swiglu"}
_LAYER_NORM = {
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "add_attention_bias": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
}
_WINDOW_KEYS = frozenset({"max_window_layers"})
_OF_GPT2_HEADS = (
    "n_ctx summary_type summary_use_proj summary_activation summary_proj_to_labels "
    "summary_first_dropout"
)

FAMILIES: dict[str, Family] = {
    "llama": Family(
        class_name="LlamaForCausalLM",
        settings=_LLAMA_SETTINGS,
        keys=_LLAMA_KEYS,
        defaults=_LLAMA_DEFAULTS,
        activations=_SWIGLU,
        no_effect=frozenset({"pretraining_tp"}),
    ),
    "mistral": Family(
        class_name="MistralForCausalLM",
        settings=_LLAMA_SETTINGS,
        keys=_LLAMA_KEYS,
        defaults=_LLAMA_DEFAULTS
        | {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        activations=_SWIGLU,
    ),
    "qwen2": Family(
        class_name="Qwen2ForCausalLM",
        settings=_LLAMA_SETTINGS | {"add_qkv_bias": True},
        keys=_LLAMA_KEYS,
        defaults=_LLAMA_DEFAULTS | {"max_position_embeddings": 32768, "num_key_value_heads": 32},
        activations=_SWIGLU,
        no_effect=_WINDOW_KEYS,
    ),
    "qwen3": Family(
        class_name="Qwen3ForCausalLM",
        settings=_LLAMA_SETTINGS | {"qk_layernorm": True},
        keys=_LLAMA_KEYS,
        defaults=_LLAMA_DEFAULTS
        | {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
        activations=_SWIGLU,
        no_effect=_WINDOW_KEYS,
    ),
    "gpt_neox": Family(
        class_name="GPTNeoXForCausalLM",
        settings=_LAYER_NORM | {"position_embedding_type": "rope"},
        keys=_SHAPE_KEYS
        | {"norm_epsilon": "layer_norm_eps", "parallel_residual": "use_parallel_residual"},
        defaults={
            "max_position_embeddings": 2048,
            "initializer_range": 0.02,
            "layer_norm_eps": 1e-5,
            "use_parallel_residual": True,
            "rotary_pct": 0.25,
        },
        activations={"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
        rotary_base_key="rotary_emb_base",
        rotary_percent_key="rotary_pct",
        must_be={"attention_bias": (True,), "is_decoder": (False, True)},
    ),
    "gpt2": Family(
        class_name="GPT2LMHeadModel",
        settings=_LAYER_NORM
        | {"position_embedding_type": "learned_absolute", "parallel_residual": False},
        keys={
            "num_layers": "n_layer",
            "hidden_size": "n_embd",
            "ffn_hidden_size": "n_inner",
            "num_attention_heads": "n_head",
            "vocab_size": "vocab_size",
            "max_position_embeddings": "n_positions",
            "norm_epsilon": "layer_norm_epsilon",
            "init_method_std": "initializer_range",
        },
        defaults={
            "n_inner": None,
            "n_positions": 1024,
            "layer_norm_epsilon": 1e-5,
            "initializer_range": 0.02,
        },
        activation_key="activation_function",
        activations={"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
        tied_by_default=True,
        rotary_base_key=None,
        must_be={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
            "add_cross_attention": (False,),
        },
        no_effect=frozenset(_OF_GPT2_HEADS.split()),
    ),
}

STOCK_ACTIVATIONS = {"swiglu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new"}
"""What an export writes."""
_DROPOUT = "attention_dropout hidden_dropout classifier_dropout resid_pdrop embd_pdrop attn_pdrop"
_OF_ANY_MODEL = (
    "model_type architectures auto_map torch_dtype dtype transformers_version name_or_path "
    "use_cache output_attentions output_hidden_states output_scores return_dict "
    "return_dict_in_generate id2label label2id num_labels problem_type finetuning_task prefix "
    "task_specific_params tokenizer_class gradient_checkpointing torchscript use_bfloat16 "
    "tf_legacy_loss chunk_size_feed_forward tie_encoder_decoder attn_implementation "
    "tie_last_hidden_states"
)
_OF_GENERATION = (
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id max_length "
    "min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature "
    "top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens"
)
NO_EFFECT = frozenset(f"{_DROPOUT} {_OF_ANY_MODEL} {_OF_GENERATION}".split())
"""Keys of any config that the numbers do not depend on. Those of dropout are a run's."""
MUST_BE: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "pruned_heads": ({},),
    "per_layer_config": ({},),
}
OWN_KEYS = {
    "llama": frozenset({"attention_bias", "mlp_bias"}),
    "mistral": frozenset({"sliding_window", "layer_types"}),
    "qwen2": frozenset({"sliding_window", "use_sliding_window", "layer_types"}),
    "qwen3": frozenset({"sliding_window", "use_sliding_window", "layer_types", "attention_bias"}),
}
"""Keys that a class reads and that have a rule of their own."""


def family_of(config: Config) -> Family:
    """The stock class that a config is of.

    Raises:
        ConversionError: one that is not known here.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ConversionError(
            f"config.json: model_type {model_type!r} is not supported. Supported: "
            f"{', '.join(FAMILIES)}."
        )
    return FAMILIES[model_type]
