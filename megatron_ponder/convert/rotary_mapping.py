"""Rotary positions in a Hugging Face config: transformers 5's form, the older one, and ours.

Imports no torch. Left out: scalings that our model does not have, which are refused by name.
"""

from collections.abc import Mapping
from typing import Any

from megatron_ponder.config.resolved import ResolvedModelConfig
from megatron_ponder.convert.family import Config, Family
from megatron_ponder.convert.json_values import problem_of, shown

DEFAULT_ROTARY_BASE = 10000.0
_SCALING_KEYS = {
    "factor": "rope_scaling_factor",
    "low_freq_factor": "rope_scaling_low_freq_factor",
    "high_freq_factor": "rope_scaling_high_freq_factor",
    "original_max_position_embeddings": "rope_scaling_original_max_position_embeddings",
}


def read_rotary(
    family: Family, config: Config, settings: Mapping[str, Any], problems: list[str]
) -> dict[str, Any]:
    """Base, share of channels and scaling, in transformers 5's form or the older one."""
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    for key, value in (("rope_scaling", old), ("rope_parameters", new)):
        if not isinstance(value, dict | None):
            problems.append(f"{key} {shown(value)}: must be an object or null")
            return {}
    if old and new and old != new:
        problems.append("rope_scaling and rope_parameters differ: leave one out")
    parameters = dict(old or new or {})
    if any(isinstance(value, dict) for value in parameters.values()):
        problems.append("rope_parameters by layer type: all layers here have the same")
        return {}
    assert family.rotary_base_key is not None
    wrong = _wrong_types(family, config, parameters)
    if wrong:
        problems += wrong
        return {}
    base_keys = (family.rotary_base_key, "rope_theta")
    bases = [parameters.pop("rope_theta", None), *(config.get(key) for key in base_keys)]
    bases = [base for base in bases if base is not None]
    if len(set(map(float, bases))) > 1:
        problems.append(
            f"rotary bases differ: {', '.join(map(str, bases))} (rope_theta and others)"
        )
    shares = [parameters.pop("partial_rotary_factor", None), config.get("partial_rotary_factor")]
    if family.rotary_percent_key is not None:
        shares += [config.get(family.rotary_percent_key), family.defaults["rotary_pct"]]
    share = next((share for share in shares if share is not None), 1.0)
    if family.rotary_percent_key is None and share != 1.0:
        problems.append(f"partial_rotary_factor {share}: a {config['model_type']} rotates all")
    kind = parameters.pop("rope_type", parameters.pop("type", "default"))
    parameters.pop("type", None)
    return {
        "rotary_base": float(bases[0]) if bases else DEFAULT_ROTARY_BASE,
        "rotary_percent": float(share),
        **_scaling(kind, parameters, settings, problems),
    }


def _wrong_types(family: Family, config: Config, parameters: Config) -> list[str]:
    """Numbers that are none, and a kind that has no name."""
    settings = {"rope_theta": "rotary_base", "partial_rotary_factor": "rotary_percent"}
    settings |= {family.rotary_base_key or "": "rotary_base"}
    settings |= {family.rotary_percent_key or "": "rotary_percent"}
    checked = [problem_of(key, config.get(key), ours) for key, ours in settings.items()]
    settings |= _SCALING_KEYS
    checked += [problem_of(key, parameters.get(key), ours) for key, ours in settings.items()]
    checked += [
        f"{key} {shown(parameters[key])}: must be a string"
        for key in ("rope_type", "type")
        if not isinstance(parameters.get(key, ""), str)
    ]
    return [problem for problem in checked if problem is not None]


def _scaling(
    kind: str, parameters: Config, settings: Mapping[str, Any], problems: list[str]
) -> dict[str, Any]:
    """The way rotary positions are stretched."""
    off = {"use_rope_scaling": False, "rotary_seq_len_interpolation_factor": None}
    readers = {
        "default": {},
        "linear": {"factor": "rotary_seq_len_interpolation_factor"},
        "llama3": _SCALING_KEYS,
    }
    if kind not in readers:
        problems.append(f"rope_type {kind!r}: supported are {', '.join(readers)}")
        return off
    names = readers[kind]
    stated = {"original_max_position_embeddings": settings["max_position_embeddings"], **parameters}
    unknown = [key for key in parameters if key not in names and parameters[key] is not None]
    missing = [key for key in names if stated.get(key) is None]
    if unknown or missing:
        problems += [f"rope_type {kind}: {key} is not supported" for key in unknown]
        problems += [f"rope_type {kind}: {key} is missing" for key in missing]
        return off
    scaling = off | {ours: stated[theirs] for theirs, ours in names.items()}
    return scaling | {"use_rope_scaling": kind == "llama3"}


def build_rope_scaling(model: ResolvedModelConfig) -> dict[str, Any] | None:
    """rope_scaling in the form that transformers 4 and 5 read."""
    values = vars(model)
    if model.use_rope_scaling:
        names = _SCALING_KEYS.items()
        return {"rope_type": "llama3", **{theirs: values[ours] for theirs, ours in names}}
    factor = model.rotary_seq_len_interpolation_factor
    return None if factor is None else {"rope_type": "linear", "factor": factor}
