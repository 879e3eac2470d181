"""What a model family is: facts about its stock Hugging Face class, as data.

One module in `convert/families/` is one family: the keys of its config, its weight names, how it
keeps attention heads, its classes. `find_family` finds it by name. A new family needs such a
module, and two classes in `remote_code/`, which is copied into exports and cannot import from here.
"""

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from megatron_ponder.convert.json_values import shown
from megatron_ponder.convert.weight_rules import OUTPUT_LAYER, Rule
from megatron_ponder.errors import ConversionError

FAMILIES_PACKAGE = "megatron_ponder.convert.families"

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """A stock class: the keys of its config, its weights, and what they mean here."""

    class_name: str
    """Name of the stock class."""
    exported_prefix: str
    """Prefix of the classes in `remote_code/` that run an export with thoughts."""
    settings: dict[str, Any]
    """Settings that are the same in every model of the family."""
    keys: dict[str, str]
    """Our settings by name, and the config key of each."""
    defaults: dict[str, Any]
    """The stock class's defaults; a key without one is required."""
    activation_key: str = "hidden_act"
    activations: dict[str, str]
    """Values of that key, and our names."""
    dropout_keys: dict[str, str]
    """Keys of dropout probabilities, and our settings."""
    tied_by_default: bool = False
    rotary_base_key: str | None = "rope_theta"
    """None: positions are learned."""
    rotary_percent_key: str | None = None
    """None: all channels are rotated."""
    uses_window_by_default: bool = False
    """Whether a sliding window applies without `use_sliding_window`."""
    must_be: dict[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    """Keys that change the computation, and the values that we compute."""
    own_keys: frozenset[str] = frozenset()
    """Keys with code of their own in `config_mapping`."""
    no_effect: frozenset[str] = frozenset()
    """Further keys without an effect on the numbers."""
    authors_settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What the authors' modelling file does whatever its config says."""
    base_prefix: str
    """Prefix of all weight names but the head's; files of a model without its head lack it."""
    rules: tuple[Rule, ...]
    """All weights, in order; `{i}` stands for the layer."""

    @property
    def head(self) -> str:
        """The output layer's weight, which a checkpoint with tied embeddings may repeat."""
        return next(rule.theirs[0] for rule in self.rules if rule.ours == OUTPUT_LAYER)


def family_names() -> list[str]:
    """All families, by `model_type`."""
    package = importlib.import_module(FAMILIES_PACKAGE)
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__))


def find_family(name: object) -> Family:
    """The family of that name: `model_type` in config.json, `--architecture` here.

    Raises:
        ConversionError: there is none.
    """
    if name not in family_names():
        raise ConversionError(
            f"model_type {shown(name)} is not supported. Supported: {', '.join(family_names())}."
        )
    family = importlib.import_module(f"{FAMILIES_PACKAGE}.{name}").FAMILY
    assert isinstance(family, Family)
    return family


SHAPE_KEYS = {
    "num_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "init_method_std": "initializer_range",
}
LAYER_NORM_SETTINGS = {
    "normalization": "LayerNorm",
    "add_bias_linear": True,
    "add_attention_bias": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
}
STOCK_ACTIVATIONS = {"swiglu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_new"}
"""What an export writes."""
_DROPOUT = "attention_dropout hidden_dropout classifier_dropout resid_pdrop embd_pdrop attn_pdrop"
_OF_ANY_MODEL = (
    "model_type architectures auto_map torch_dtype dtype transformers_version name_or_path "
    "use_cache output_attentions output_hidden_states output_scores return_dict "
    "return_dict_in_generate id2label label2id num_labels problem_type finetuning_task "
    "tokenizer_class gradient_checkpointing torchscript use_bfloat16 "
    "tf_legacy_loss chunk_size_feed_forward tie_encoder_decoder attn_implementation "
    "tie_last_hidden_states"
)
_OF_GENERATION = (
    "bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id max_length "
    "min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature "
    "top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size "
    "encoder_no_repeat_ngram_size bad_words_ids num_return_sequences forced_bos_token_id "
    "forced_eos_token_id remove_invalid_values exponential_decay_length_penalty suppress_tokens "
    "begin_suppress_tokens prefix task_specific_params"
)
GENERATION_KEYS = tuple(_OF_GENERATION.split())
"""Keys of any config that only generation depends on; an export has those of the import."""
NO_EFFECT = frozenset([*f"{_DROPOUT} {_OF_ANY_MODEL}".split(), *GENERATION_KEYS])
"""Keys of any config that the numbers do not depend on. Those of dropout are a run's."""
MUST_BE: dict[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "pruned_heads": ({},),
    "per_layer_config": ({},),
}
