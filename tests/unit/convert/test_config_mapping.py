"""Stock configs as settings and back, method keys of both families, and what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.schema import MethodConfig, RunConfig
from megatron_ponder.convert import exported_code
from megatron_ponder.convert.config_mapping import build_stock_config, read_model_settings
from megatron_ponder.convert.family import family_names, find_family
from megatron_ponder.convert.importing import read_config_json
from megatron_ponder.convert.method_mapping import SETTINGS, build_method_keys, read_method
from megatron_ponder.errors import ConversionError
from tests.unit.convert.stock_models import MODELS, stock_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
}
GPT2: dict[str, Any] = {
    "model_type": "gpt2",
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 100,
}


def of_type(model_type: str, **more: Any) -> dict[str, Any]:
    return LLAMA | {"model_type": model_type} | more


def run_of(**settings: Any) -> RunConfig:
    shortened = {"method": "vanilla", "seq_length": 16} | settings
    return resolve(RunConfig().replaced(**shortened), world_size=1)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_what_is_written(name: str) -> None:
    """The stock class built from our config is the one that it came from."""
    config = stock_config(name)
    settings = read_model_settings(config.to_dict())
    written = build_stock_config(run_of(**settings))
    again = transformers.AutoConfig.for_model(**written)
    before, after = config.to_dict(), again.to_dict()
    assert type(again) is type(config)
    ignored = {"architectures", "sliding_window", "dtype", "layer_types", *_dropouts(before)}
    ignored |= {key for key in ("intermediate_size", "n_inner") if before.get(key) is None}
    for key in before.keys() - ignored:
        assert after[key] == before[key], key
    assert read_model_settings(written) == settings


def _dropouts(config: dict[str, Any]) -> set[str]:
    return {key for key in config if key.endswith(("pdrop", "dropout"))}


@pytest.mark.parametrize("model_type", family_names())
def test_defaults_are_those_of_the_stock_class(model_type: str) -> None:
    """A key that is left out means here what it means there."""
    family = find_family(model_type)
    shape = GPT2 if model_type == "gpt2" else LLAMA
    if model_type == "mistral":  # its own window is too short for its own length
        shape = shape | {"sliding_window": None}
    left_out = read_model_settings({**shape, "model_type": model_type, "sliding_window": None})
    given = {k: v for k, v in shape.items() if k != "model_type"}
    whole = transformers.AutoConfig.for_model(model_type, **given).to_dict()
    if model_type == "qwen3":
        left_out["kv_channels"] = whole["head_dim"]
    settings = read_model_settings(whole | {"sliding_window": None})
    assert left_out == settings
    assert transformers.AutoConfig.for_model(model_type).tie_word_embeddings is (
        family.tied_by_default
    )


@pytest.mark.parametrize("model_type", family_names())
def test_every_key_of_the_stock_class_is_known(model_type: str) -> None:
    """None of them is refused as unknown, so that none is unknown to us."""
    config = transformers.AutoConfig.for_model(model_type).to_dict() | {"sliding_window": None}
    read_model_settings({key: value for key, value in config.items() if key != "layer_types"})


ROPE_FORMS = [
    {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
]


@pytest.mark.parametrize("form", ROPE_FORMS)
def test_old_and_new_forms_of_rotary_positions(form: dict[str, Any]) -> None:
    settings = read_model_settings(LLAMA | form)
    assert settings["rotary_base"] == 5e5 and settings["rotary_seq_len_interpolation_factor"] == 2.0
    theirs = transformers.AutoConfig.for_model(**(LLAMA | form)).rope_parameters
    assert theirs["factor"] == 2.0 and theirs["rope_theta"] == 5e5


REFUSED = [
    (of_type("mixtral"), "model_type 'mixtral' is not supported"),
    ({"hidden_size": 4}, "model_type None"),
    ({k: v for k, v in LLAMA.items() if k != "num_hidden_layers"}, "lacks num_hidden_layers"),
    (LLAMA | {"hidden_act": "relu"}, "hidden_act 'relu': supported are silu"),
    (GPT2 | {"activation_function": "relu"}, "activation_function 'relu'"),
    (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config: the weights are quant"),
    (LLAMA | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
    (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic'"),
    (
        LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "low_freq_factor is missing",
    ),
    (
        LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta_fast": 32}},
        "rope_type linear: beta_fast is not supported",
    ),
    (
        LLAMA | {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
        "by layer type",
    ),
    (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    (LLAMA | {"rms_norm_eps": None}, "rms_norm_eps null"),
    (LLAMA | {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rotary bases differ"),
    (LLAMA | {"mlp_bias": True}, "mlp_bias without attention_bias"),
    (LLAMA | {"attn_output_gate": True}, "attn_output_gate True: not known to this converter"),
    (LLAMA | {"add_cross_attention": True}, "add_cross_attention True"),
    (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    (GPT2 | {"rope_theta": 1e4}, "rope_theta 10000.0: not known"),
    (of_type("gpt_neox", attention_bias=False), "attention_bias False"),
    (of_type("mistral", sliding_window=128), "sliding_window 128"),
    (of_type("mistral"), "sliding_window 4096"),
    (of_type("qwen2", use_sliding_window=True, sliding_window=8), "sliding_window 8"),
    (of_type("qwen3", layer_types=["linear_attention"] * 2), "layer_types linear_attention"),
    (LLAMA | {"num_attention_heads": 0}, "num_attention_heads 0: must be at least 1"),
    (LLAMA | {"num_hidden_layers": 3.5}, "num_hidden_layers 3.5: must be a whole number"),
    (LLAMA | {"hidden_size": 10**30}, "must be a whole number below 2^31"),
    (LLAMA | {"rms_norm_eps": float("nan")}, "rms_norm_eps nan: must be a finite number"),
    (LLAMA | {"rms_norm_eps": 10**400}, "must be a finite number"),
    (LLAMA | {"rope_theta": True}, "rope_theta True: must be a finite number"),
    (LLAMA | {"rope_scaling": True}, "rope_scaling True: must be an object"),
    (LLAMA | {"rope_scaling": {"type": []}}, "type []: must be a string"),
    (LLAMA | {"rope_scaling": {"type": "linear", "factor": "2"}}, "factor '2': must be a finite"),
    (LLAMA | {"hidden_act": ["silu"]}, "hidden_act ['silu']: must be a string"),
    (LLAMA | {"tie_word_embeddings": "false"}, "tie_word_embeddings 'false': must be true or"),
    (LLAMA | {"attention_bias": "no"}, "attention_bias 'no': must be true or false"),
    (of_type("qwen2", layer_types=3), "layer_types 3: must be a list of strings"),
    (of_type("qwen2", sliding_window="8"), "sliding_window '8': must be a whole number"),
]


@pytest.mark.parametrize(("config", "reason"), REFUSED, ids=lambda v: v if type(v) is str else None)
def test_refused_by_name(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConversionError) as raised:
        read_model_settings(config)
    assert reason in str(raised.value)


def test_all_problems_at_once_and_a_way_round_unknown_keys() -> None:
    config = LLAMA | {"hidden_act": "relu", "unknown_key": 1, "other": 2}
    with pytest.raises(ConversionError, match="hidden_act") as raised:
        read_model_settings(config)
    assert "--ignore-config-keys unknown_key" in str(raised.value) and "other" in str(raised.value)
    config["hidden_act"] = "silu"
    read_model_settings(config, ignored_keys=("unknown_key", "other"))


NOT_STOCK = [
    ({"normalization": "LayerNorm"}, "--normalization LayerNorm"),
    ({"qk_layernorm": True}, "--qk-layernorm True"),
    ({"activation": "gelu"}, "hidden_act 'gelu'"),
    ({"position_embedding_type": "learned_absolute"}, "--position-embedding-type"),
    ({"parallel_residual": True}, "--parallel-residual True"),
    ({"add_qkv_bias": True}, "--add-qkv-bias True"),
    ({"rotary_percent": 0.5}, "--rotary-percent 0.5"),
    ({"architecture": "qwen3"}, "--qk-layernorm False"),
    ({"architecture": "mistral", "add_bias_linear": True}, "--add-bias-linear True"),
]


@pytest.mark.parametrize(("settings", "reason"), NOT_STOCK)
def test_what_no_stock_class_computes_is_not_exported(
    settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ConversionError, match="no stock") as raised:
        build_stock_config(run_of(vocab_size=100, **settings))
    assert reason in str(raised.value)


AUTHORS = {
    "recurrent_model": True,
    "num_latent_thoughts": 2,
    "num_jacobi_iterations": 4,
    "random_jacobi_iterations": True,
    "scale_embeds": True,
    "interpolation": False,
}
NAMED = LLAMA | AUTHORS | {"method": "ponderlm2"}
OLDER = {
    "more_iterations": 2,
    "eval_refinement_steps": 4,
    "vary_refine_steps": True,
    "scale_embeds": True,
}


@pytest.mark.parametrize("keys", [AUTHORS, OLDER])
@pytest.mark.parametrize("method", ["ponderlm2", "ponderlm", "loop"])
def test_both_families_of_keys(keys: dict[str, Any], method: str) -> None:
    """The authors' checkpoints do not name their method, and have R whatever it is."""
    config = of_type("gpt_neox", **keys)
    with pytest.raises(ConversionError, match="Give the method .*: --method ponderlm2, ponderlm"):
        read_method(config, {})
    found = read_method(config, {"method": method})
    assert found.result == found.result | found.source
    assert (found.source["method"], found.source["num_latent_thoughts"]) == (method, 2)
    assert found.source["num_jacobi_iterations"] == 4 and found.source["random_jacobi_iterations"]
    assert found.result["max_jacobi_iterations"] == 4  # the authors' range for GPT-NeoX
    assert "as asked" in found.remark


@pytest.mark.parametrize("key", ["num_latent_thoughts", "scale_embeds", "pause_token_id"])
def test_one_key_of_a_method_is_enough_to_ask(key: str) -> None:
    """Also with K = 0: methods scale embeddings differently."""
    with pytest.raises(ConversionError, match="Give the method"):
        read_method(LLAMA | {key: False if key == "scale_embeds" else 0}, {})
    plain = read_method(LLAMA | {key: 0}, {"method": "vanilla"})
    assert plain.source == plain.result == {"method": "vanilla"}


def test_what_the_authors_files_ignore() -> None:
    """Their ponderlm mixes all embeddings; what this package exports means what it says."""
    authors = LLAMA | AUTHORS | {"interpolation_use_topk": True}
    found = read_method(authors, {"method": "ponderlm"})
    assert found.source["interpolation_use_topk"] is False is found.result["interpolation_use_topk"]
    assert read_method(authors, {"method": "ponderlm2"}).source["interpolation_use_topk"]
    assert read_method(authors | {"method": "ponderlm"}, {}).source["interpolation_use_topk"]
    stock = read_method(authors | {"method": "ponderlm2", "recurrent_model": False}, {})
    assert stock.source == {"method": "vanilla"}


def test_what_is_asked_beats_what_is_stored() -> None:
    found = read_method(LLAMA | AUTHORS, {"method": "ponderlm2", "num_jacobi_iterations": 6})
    assert found.result["num_jacobi_iterations"] == 6
    assert found.source["num_jacobi_iterations"] == 4
    stated = LLAMA | AUTHORS | {"method": "ponderlm2"}
    found = read_method(stated, {"method": "vanilla"})
    assert (found.source["method"], found.result["method"]) == ("ponderlm2", "vanilla")
    found = read_method(LLAMA, {"method": "loop", "num_latent_thoughts": 3})
    assert found.source == {"method": "vanilla"} and found.result["num_latent_thoughts"] == 3


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LLAMA | {"recurrent_model": True}, "--method ponderlm2"),
        (LLAMA | AUTHORS | {"pause_token_id": 7}, "--method ponderlm2"),
        (NAMED | {"more_iterations": 3}, "num_latent_thoughts 2 and more_iterations 3"),
        (LLAMA | {"method": "loop", "num_latent_thoughts": 3}, "Give --scale-embeds"),
        (LLAMA | {"method": "pause", "scale_embeds": True}, "--num-latent-thoughts, --pause-token"),
        (NAMED | {"num_latent_thoughts": "2"}, "must be a whole number"),
        (NAMED | {"num_jacobi_iterations": True}, "must be a whole number"),
        (NAMED | {"ponderlm_feedback": "x"}, "must be mixture or hidden"),
        (LLAMA | {"recurrent_model": "yes"}, "must be true or false"),
        (LLAMA | {"method": "os.path"}, "must name a method"),
    ],
)
def test_methods_that_are_not_clear(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConversionError) as raised:
        read_method(config, {})
    assert reason in str(raised.value)


def test_method_keys_round_trip() -> None:
    """Every setting that a forward reads; none for a stock model."""
    names = {field.name for field in dataclasses.fields(MethodConfig)}
    of_training = {"method", "pause_init_method", "jacobi_grad_passes"}
    assert set(SETTINGS) == names - of_training
    run = resolve(
        RunConfig().replaced(
            method="pause", num_latent_thoughts=3, vocab_size=100, pause_always_scales=False
        ),
        world_size=1,
    )
    found = read_method(LLAMA | build_method_keys(run), {}).source
    assert RunConfig().replaced(**found).method == run.method
    assert build_method_keys(run.replaced(method="vanilla")) == {}
    # A config that says so beats what the authors' files of the architecture do.
    neox = read_method(of_type("gpt_neox", **build_method_keys(run)), {}).source
    assert neox["ponderlm_feedback"] == "mixture"


def test_the_model_type_of_exports_is_their_own_and_read_back(tmp_path: Path) -> None:
    """Stock code must not take an export for a plain model; older exports have the stock type."""
    for architecture in family_names():
        ours = exported_code.model_type(architecture)
        assert ours not in transformers.CONFIG_MAPPING
        for stored in (ours, architecture):
            (tmp_path / "config.json").write_text(json.dumps({"model_type": stored}))
            assert read_config_json(tmp_path)["model_type"] == architecture
