"""The training method in a Hugging Face config.

The authors' code writes `recurrent_model`, `num_latent_thoughts`, `num_jacobi_iterations`,
`random_jacobi_iterations`, `scale_embeds`, `interpolation`, `interpolation_use_topk` and
`pause_token_id`, and leaves to the modelling file which method they belong to. Older checkpoints
may have `more_iterations` (K), `eval_refinement_steps` (R) and `vary_refine_steps` (random R). We
write the authors' keys, `method`, and what else a forward reads, under our own names. Imports no
torch.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from megatron_ponder.config.presets import PRESETS
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.convert.family import find_family
from megatron_ponder.convert.json_values import problem_of, shown
from megatron_ponder.errors import ConversionError

OLD_KEYS = {
    "num_latent_thoughts": "more_iterations",
    "num_jacobi_iterations": "eval_refinement_steps",
    "random_jacobi_iterations": "vary_refine_steps",
}
SETTINGS = (
    "num_latent_thoughts",
    "num_jacobi_iterations",
    "random_jacobi_iterations",
    "min_jacobi_iterations",
    "max_jacobi_iterations",
    "scale_embeds",
    "interpolation",
    "interpolation_use_topk",
    "interpolation_topk",
    "residual_interpolated_embeds",
    "ponderlm_feedback",
    "pause_token_id",
    "pause_always_scales",
)
"""Settings of the method that a config holds, besides `method` itself."""
METHOD_KEYS = frozenset({"method", "recurrent_model", *SETTINGS, *OLD_KEYS.values()})

_RECIPE_SETTINGS = (
    "min_jacobi_iterations",
    "max_jacobi_iterations",
    "small_init_depth_counts_thoughts",
    "pause_init_method",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodOfSource:
    """The method of a folder's model, and the method to continue with."""

    source: dict[str, Any]
    """Settings under which the weights were trained."""
    result: dict[str, Any]
    """Settings to store."""
    remark: str
    """How the method was found, in words."""


def read_method(config: Mapping[str, Any], asked: Mapping[str, Any]) -> MethodOfSource:
    """The method of a config, changed as asked.

    Args:
        config: the content of config.json.
        asked: settings that the user gave, `method` among them or not.

    Raises:
        ConversionError: the config does not say enough, or contradicts itself.
    """
    method, remark = _find_method(config, asked)
    if method is None:
        source: dict[str, Any] = {"method": "vanilla"}
        if asked.get("method", "vanilla") != "vanilla":
            # The weights were trained on unscaled embeddings: scaled ones would be noise to them.
            changed = {"scale_embeds": False, **recipe_settings(config), **asked}
            return MethodOfSource(source=source, result=changed, remark=remark)
        return MethodOfSource(source=source, result=source, remark=remark)
    settings = _read_settings(config, method, asked)
    source = {"method": method, **settings}
    result = {"method": method, **recipe_settings(config), **settings, **asked}
    return MethodOfSource(source=source, result=result, remark=remark)


def _find_method(config: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[str | None, str]:
    """The method that a config is of, None for a stock model; and how it was found.

    Nothing is inferred: the authors' loader writes R, for example, into the config of every method.
    """
    stated, is_recurrent = config.get("method"), config.get("recurrent_model")
    if is_recurrent not in (None, True, False):
        raise ConversionError(
            f"config.json: recurrent_model {shown(is_recurrent)}: must be true or false."
        )
    if is_recurrent is False:
        return None, "config.json says recurrent_model false"
    if stated is not None:
        # Names only: a dotted one would be a module that the folder makes this process import.
        if not isinstance(stated, str) or not stated.isidentifier():
            raise ConversionError(f"config.json: method {shown(stated)}: must name a method.")
        return _none_if_plain(stated), "config.json says so"
    keys = sorted(key for key in METHOD_KEYS if config.get(key) is not None)
    if not keys:
        return None, "config.json has no key of a method"
    if "method" in asked:
        return _none_if_plain(asked["method"]), "as asked: config.json does not name it"
    raise ConversionError(
        f"config.json has keys of a method ({', '.join(keys)}) and does not say of which: the "
        "authors' checkpoints of all methods look alike. Give the method that the weights were "
        "trained with: --method ponderlm2, ponderlm, loop, pause or vanilla."
    )


def _none_if_plain(method: str) -> str | None:
    return None if method == "vanilla" else method


def _read_settings(
    config: Mapping[str, Any], method: str, asked: Mapping[str, Any]
) -> dict[str, Any]:
    """Settings that the source's forward depends on."""
    stated = _stated(config)
    if method == "ponderlm" and config.get("method") is None:
        # The authors' ponderlm files mix all embeddings, whatever their config says.
        stated["interpolation_use_topk"] = False
    completed = {
        **find_family(config.get("model_type")).authors_settings,
        **{name: value for name, value in asked.items() if name in SETTINGS},
        **stated,
    }
    needed = ["num_latent_thoughts", "scale_embeds"]
    if method == "pause":
        needed.append("pause_token_id")
    missing = [f"--{name.replace('_', '-')}" for name in needed if name not in completed]
    if missing:
        raise ConversionError(
            f"config.json is of method {method} and leaves out what a forward needs. Give "
            f"{', '.join(missing)}."
        )
    return completed


def _stated(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that the config has, under either family's key.

    Raises:
        ConversionError: both are there and differ, or a value has the wrong type.
    """
    stated = {name: config[name] for name in SETTINGS if config.get(name) is not None}
    for name, old in OLD_KEYS.items():
        value = config.get(old)
        if value is None:
            continue
        if name in stated and stated[name] != value:
            raise ConversionError(
                f"config.json: {name} {shown(stated[name])} and {old} {shown(value)} are the same "
                "setting and differ. Remove one of them."
            )
        stated[name] = value
    for name, value in stated.items():
        if (problem := problem_of(name, value, name)) is not None:
            raise ConversionError(f"config.json: {problem}.")
    return stated


def recipe_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which the authors' recipes for the architecture differ, from its presets."""
    for preset in PRESETS.values():
        if preset["architecture"] == config.get("model_type"):
            recipe = {name: preset[name] for name in _RECIPE_SETTINGS if name in preset}
            return recipe | find_family(config.get("model_type")).authors_settings
    return {}


def build_method_keys(run: ResolvedConfig) -> dict[str, Any]:
    """Keys of a config for the method of a run; none for a stock model."""
    if run.method.method == "vanilla":
        return {}
    values = vars(run.method)
    return {
        "recurrent_model": True,
        "method": run.method.method,
        **{name: values[name] for name in SETTINGS},
    }
