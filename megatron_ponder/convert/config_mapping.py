"""A stock Hugging Face config as our settings, and back. Imports no torch and no transformers.

A key of a config is one of four things: a setting of ours, a fixed value (any other would need a
computation that we do not have), a key without effect on the numbers, or unknown. Unknown keys are
refused by name, since ignoring one could change the model silently. Missing keys have the defaults
of transformers' own classes. Keys of the training method are in method_mapping.py. Left out:
dropout, which belongs to a run and not to a model, and keys that only affect generation.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.convert.family import (
    MUST_BE,
    NO_EFFECT,
    STOCK_ACTIVATIONS,
    Config,
    Family,
    family_names,
    find_family,
)
from megatron_ponder.convert.json_values import problem_of, shown
from megatron_ponder.convert.method_mapping import METHOD_KEYS
from megatron_ponder.convert.rotary_mapping import build_rope_scaling, read_rotary
from megatron_ponder.errors import ConversionError


def read_model_settings(config: Config, ignored_keys: Iterable[str] = ()) -> dict[str, Any]:
    """The shape of the model, as settings by name.

    Args:
        config: the content of config.json.
        ignored_keys: keys that the user declares to have no effect.

    Raises:
        ConversionError: the config needs computations that we do not have (all are named), or
            lacks a key.
    """
    family = find_family(config.get("model_type"))
    relevant = {key: value for key, value in config.items() if key not in set(ignored_keys)}
    missing = [
        key
        for key in family.keys.values()
        if key not in family.defaults and relevant.get(key) is None
    ]
    if missing:
        raise ConversionError(
            f"config.json lacks {', '.join(missing)}, without which a {config['model_type']} model "
            "has no shape."
        )
    _raise_if_any(_wrong_types(family, relevant))
    known = family.defaults | relevant
    settings = {"architecture": config["model_type"], **family.settings}
    settings |= {ours: known[theirs] for ours, theirs in family.keys.items()}
    problems = [
        *_values_that_must_be(family, relevant),
        *_unknown_keys(family, relevant),
        *_windows(family, known),
    ]
    activation = relevant.get(family.activation_key) or next(iter(family.activations))
    if activation not in family.activations:
        problems.append(
            f"{family.activation_key} {activation!r}: supported are {', '.join(family.activations)}"
        )
    settings["activation"] = family.activations.get(activation)
    settings |= _derived_shape(settings)
    problems += [
        f"{theirs} null: must be given"
        for ours, theirs in family.keys.items()
        if settings[ours] is None
    ]
    settings |= _biases(family, relevant, problems)
    tied = relevant.get("tie_word_embeddings")
    is_tied = family.tied_by_default if tied is None else tied
    settings["untie_embeddings_and_output_weights"] = not is_tied
    if family.rotary_base_key is not None:
        settings |= read_rotary(family, relevant, settings, problems)
    _raise_if_any(problems)
    return settings


def _raise_if_any(problems: list[str]) -> None:
    if problems:
        raise ConversionError("config.json cannot be converted:\n  - " + "\n  - ".join(problems))


_SETTING_OF_OWN_KEY = {
    "attention_bias": "add_attention_bias",
    "mlp_bias": "add_bias_linear",
    "use_sliding_window": "add_bias_linear",
    "sliding_window": "max_position_embeddings",
    "tie_word_embeddings": "untie_embeddings_and_output_weights",
}
"""A setting of the same type as each key that has code of its own below."""


def _wrong_types(family: Family, config: Config) -> list[str]:
    """Values that no stock class could compute with, or that it would take for something else."""
    settings = {theirs: ours for ours, theirs in family.keys.items()}
    settings |= {k: v for k, v in _SETTING_OF_OWN_KEY.items() if k not in family.must_be}
    checked = [problem_of(key, config.get(key), ours) for key, ours in settings.items()]
    problems = [problem for problem in checked if problem is not None]
    layers = config.get("layer_types")
    if not isinstance(layers, list | None) or not all(isinstance(x, str) for x in layers or ()):
        problems.append(f"layer_types {shown(layers)}: must be a list of strings")
    activation = config.get(family.activation_key)
    if not isinstance(activation, str | None):
        problems.append(f"{family.activation_key} {shown(activation)}: must be a string")
    return problems


def _derived_shape(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that stock classes derive if their keys are missing."""
    heads, hidden = settings["num_attention_heads"], settings["hidden_size"]
    derived = {
        "ffn_hidden_size": 4 * hidden,
        "num_query_groups": heads,
        "kv_channels": hidden // heads,
    }
    return {name: value for name, value in derived.items() if settings.get(name) is None}


def _values_that_must_be(family: Family, config: Config) -> Iterator[str]:
    """Keys with a value that needs a computation that we do not have."""
    if config.get("quantization_config") is not None:
        yield (
            "quantization_config: the weights are quantised; convert the model that they were "
            "made from"
        )
    for key, allowed in (MUST_BE | family.must_be).items():
        value = config.get(key)
        if value is not None and value not in allowed:
            supported = " or ".join(map(str, allowed)) if allowed else "null"
            yield f"{key} {shown(value)}: only {supported} is supported"


def _unknown_keys(family: Family, config: Config) -> Iterator[str]:
    """Keys that this converter does not know."""
    known = {
        *family.keys.values(),
        *family.must_be,
        *family.no_effect,
        *MUST_BE,
        *NO_EFFECT,
        *METHOD_KEYS,
        family.activation_key,
        "quantization_config",
        "tie_word_embeddings",
    }
    if family.rotary_base_key is not None:
        known |= {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"}
        known |= {key for key in (family.rotary_base_key, family.rotary_percent_key) if key}
    known |= family.own_keys
    for key, value in config.items():
        if key not in known and value is not None and not key.startswith("_"):
            yield (
                f"{key} {shown(value)}: not known to this converter; if it has no effect on the "
                f"numbers, say so: --ignore-config-keys {key}"
            )


def _windows(family: Family, known: Config) -> Iterator[str]:
    """Refuse sliding-window attention."""
    window = known.get("sliding_window")
    longest = known.get("max_position_embeddings")
    is_used = known.get("use_sliding_window", family.uses_window_by_default)
    if is_used and window is not None and window < longest:
        yield (
            f"sliding_window {window}: attention here sees the whole sequence; only null, or at "
            f"least max_position_embeddings ({longest}), is supported"
        )
        return
    others = set(known.get("layer_types") or ()) - {"full_attention"}
    if others and not (others == {"sliding_attention"} and window is not None and is_used):
        yield f"layer_types {', '.join(sorted(others))}: only full_attention is supported"


def _biases(family: Family, config: Config, problems: list[str]) -> dict[str, Any]:
    """Llama's and Qwen3's optional biases."""
    if "attention_bias" not in family.own_keys:
        return {}
    in_attention, in_mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if in_mlp and not in_attention:
        problems.append("mlp_bias without attention_bias: not supported")
    return {"add_bias_linear": in_mlp, "add_attention_bias": in_attention and not in_mlp}


def build_stock_config(run: ResolvedConfig) -> dict[str, Any]:
    """config.json of the stock class for a run's model, without dtype and token ids.

    Raises:
        ConversionError: the stock class does not compute what the run's model computes.
    """
    model = run.model
    family = find_family(model.architecture)
    values = vars(model)
    config: dict[str, Any] = {
        "model_type": model.architecture,
        "architectures": [family.class_name],
        **{theirs: values[ours] for ours, theirs in family.keys.items()},
        family.activation_key: STOCK_ACTIVATIONS[model.activation],
        "tie_word_embeddings": not model.untie_embeddings_and_output_weights,
        "use_cache": True,
        **{theirs: values[ours] for theirs, ours in family.dropout_keys.items()},
    }
    own = family.own_keys
    if "attention_bias" in own:
        config["attention_bias"] = model.add_bias_linear or model.add_attention_bias
    if "mlp_bias" in own:
        config["mlp_bias"] = model.add_bias_linear
    if "sliding_window" in own:
        config["sliding_window"] = None
    if "use_sliding_window" in own:
        config["use_sliding_window"] = False
    if family.rotary_base_key is not None:
        config[family.rotary_base_key] = model.rotary_base
        config["rope_scaling"] = build_rope_scaling(model)
        if family.rotary_percent_key is not None:
            config[family.rotary_percent_key] = model.rotary_percent
    _check_stock_config(config, run)
    return config


def _check_stock_config(config: Config, run: ResolvedConfig) -> None:
    """Read the config back: a setting that differs is not supported by the stock class."""
    values = vars(run.model)
    try:
        stock = read_model_settings(config)
    except ConversionError as error:
        raise _no_stock_model(run, [str(error)]) from None
    problems = [
        f"--{name.replace('_', '-')} {values[name]} (the stock class has {stock[name]})"
        for name in stock
        if values[name] != stock[name]
    ]
    if problems:
        raise _no_stock_model(run, problems)


def _no_stock_model(run: ResolvedConfig, problems: list[str]) -> ConversionError:
    """The error of a model without a stock class."""
    return ConversionError(
        f"The model is no stock {run.model.architecture} model, so transformers has no class for "
        f"it: {'; '.join(problems)}. Train with the settings of a family ("
        f"{', '.join(family_names())}), and its name as --architecture."
    )
