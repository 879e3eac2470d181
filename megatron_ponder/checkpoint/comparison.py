"""What differs between the run that wrote a checkpoint and the run that loads it."""

from collections.abc import Mapping
from typing import Any

from megatron_ponder.config.layout import padded_vocab_size
from megatron_ponder.config.resolved import ResolvedConfig, ResolvedModelConfig

SHAPE_SETTINGS = frozenset(
    {
        "num_layers",
        "hidden_size",
        "ffn_hidden_size",
        "num_attention_heads",
        "num_query_groups",
        "kv_channels",
        "position_embedding_type",
        "max_position_embeddings",
        "normalization",
        "activation",
        "add_bias_linear",
        "add_qkv_bias",
        "add_attention_bias",
        "qk_layernorm",
        "parallel_residual",
        "untie_embeddings_and_output_weights",
        "vocab_size",
        "make_vocab_size_divisible_by",
    }
)
"""Model settings that must match: otherwise the stored weights have no place or another meaning.

Two of them count only as far as they show in the weights: `max_position_embeddings` as the length
of the table of learned positions, and the two of the vocabulary together, as its padded size."""

FREE_SETTINGS = frozenset(
    {
        "architecture",
        "rotary_base",
        "rotary_percent",
        "rotary_seq_len_interpolation_factor",
        "use_rope_scaling",
        "rope_scaling_factor",
        "rope_scaling_low_freq_factor",
        "rope_scaling_high_freq_factor",
        "rope_scaling_original_max_position_embeddings",
        "norm_epsilon",
        "hidden_dropout",
        "attention_dropout",
        "init_method",
        "init_method_std",
        "small_init_depth_counts_thoughts",
        "generation_defaults",
    }
)
"""Model settings that may differ: the weights fit all the same. A change is logged."""

RUN_SETTINGS = frozenset(
    {
        "exit_interval",
        "exit_duration_in_mins",
        "num_workers",
        "data_cache_path",
        "distributed_backend",
        "distributed_timeout_minutes",
    }
)
"""Settings, besides those of checkpoints and logging, that do not change what is computed."""


REPEATED_SAMPLES = "samples_of_repeated_data"


def shape_differences(stored: ResolvedConfig, ours: ResolvedConfig) -> list[str]:
    """Settings that make the stored weights unusable, one line each."""
    before, now = _shape(stored.model), _shape(ours.model)
    differences = [_line(name, before[name], now[name]) for name in now]
    return [difference for difference in differences if difference]


def _shape(model: ResolvedModelConfig) -> dict[str, Any]:
    """Everything about a model that its weights depend on."""
    vocabulary = {"vocab_size", "make_vocab_size_divisible_by"}
    values = {name: getattr(model, name) for name in sorted(SHAPE_SETTINGS - vocabulary)}
    if model.position_embedding_type != "learned_absolute":
        values["max_position_embeddings"] = None
    return values | {"padded vocabulary (vocab_size)": padded_vocab_size(model)}


def other_differences(stored: ResolvedConfig, ours: ResolvedConfig) -> list[str]:
    """Further settings that changed and that may change the numbers from here on."""
    before, now = stored.to_flat_dict(), ours.to_flat_dict()
    silent = RUN_SETTINGS.union(vars(ours.checkpoint), vars(ours.logging))
    differences = [_line(name, before[name], now[name]) for name in now if name not in silent]
    return [difference for difference in differences if difference]


def data_differences(stored: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """What makes the position in the stored run's data mean something else in ours, a line each.

    A checkpoint that does not know its data (an earlier version's) has no difference. Another
    number of samples is none either: a run may be made longer.
    """
    if not stored:
        return []
    known = dict(stored, tokenizer=_with_end(stored.get("tokenizer"), ours.get("tokenizer")))
    return [
        difference
        for name in ours
        if name != REPEATED_SAMPLES
        and (difference := _line(name.replace("_", " "), known.get(name), ours[name]))
    ]


def _with_end(stored: Any, ours: Any) -> Any:
    """A stored tokenizer; earlier versions did not store the end id, which then counts as ours."""
    if isinstance(stored, Mapping) and isinstance(ours, Mapping) and "eod" in ours:
        return {"eod": ours["eod"], **stored}
    return stored


def _line(name: str, before: object, now: object) -> str:
    """One difference in words; empty where there is none."""
    return "" if before == now else f"{name}: {before} in the checkpoint, {now} now"
