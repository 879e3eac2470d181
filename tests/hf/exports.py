"""Small exported models: the golden cases' weights, under any method's settings."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_ponder.convert import exported_code
from megatron_ponder.convert.family import find_family
from megatron_ponder.convert.remote_code import configuration_ponder, modeling_ponder

CASES = Path(__file__).parents[1] / "golden" / "cases"
NAMES = sorted(path.name for path in CASES.iterdir())
_NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_NOT_IN_THE_CASE = {
    "gpt2_vanilla": _NO_DROPOUT,
    "gpt_neox_ponderlm_k2": {"ponderlm_feedback": "hidden"},
    "gpt_neox_pause_k2": {"pause_always_scales": False},
}
"""Keys that the cases' files leave out (tests/golden, docs/methods.md)."""

WEIGHTS = {"llama": "llama_vanilla", "gpt_neox": "gpt_neox_vanilla", "gpt2": "gpt2_vanilla"}
"""A case with weights for models of each architecture; thoughts add none."""
SHARPER = {"llama": 3.0, "gpt_neox": 3.0, "gpt2": 6.0}
"""Factor on the layers' matrices: under the cases' weights slots hardly matter to one another."""
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "sliding_window": None,
    "initializer_range": 0.1,
}
"""Of the architectures that have no case."""
METHODS: dict[str, dict[str, Any]] = {
    "ponderlm2": {"method": "ponderlm2", "num_latent_thoughts": 2, "num_jacobi_iterations": 60},
    "interpolation": {
        "method": "ponderlm2",
        "num_latent_thoughts": 2,
        "num_jacobi_iterations": 60,
        "interpolation": True,
        "interpolation_use_topk": True,
        "interpolation_topk": 5,
    },
    "ponderlm": {"method": "ponderlm", "num_latent_thoughts": 2},
    "accumulating": {
        "method": "ponderlm",
        "num_latent_thoughts": 2,
        "residual_interpolated_embeds": True,
    },
    "hidden": {"method": "ponderlm", "num_latent_thoughts": 2, "ponderlm_feedback": "hidden"},
    "loop": {"method": "loop", "num_latent_thoughts": 2},
    "pause": {"method": "pause", "num_latent_thoughts": 2, "pause_token_id": 95},
}
"""Every form of a method; R is enough to converge on up to 30 tokens."""


def case_config(name: str) -> dict[str, Any]:
    """config.json of a golden case with what it leaves out."""
    stored = json.loads((CASES / name / "config.json").read_text())
    return {**stored, **_NOT_IN_THE_CASE.get(name, {})}


def case_weights(name: str, *, is_sharper: bool = False) -> dict[str, Tensor]:
    """By stock name; a tied head is not repeated."""
    state = load_file(CASES / name / "model.safetensors")
    config = case_config(name)
    if config["tie_word_embeddings"]:
        del state["lm_head.weight"]
    for weight in (t for key, t in state.items() if "layers." in key or ".h." in key):
        if is_sharper and weight.ndim == 2:
            weight *= SHARPER[config["model_type"]]
    return state


def export_case(name: str, folder: Path, *, is_sharper: bool = False, **settings: Any) -> Path:
    """A golden case's folder as the converter writes it: config, weights, code."""
    folder.mkdir(parents=True)
    config = {**case_config(name), **settings}
    if config["method"] != "vanilla":
        config["recurrent_model"] = True
        architecture = config["model_type"]
        config["model_type"] = exported_code.model_type(architecture)
        config["architectures"] = [exported_code.class_name(architecture)]
        config["auto_map"] = exported_code.auto_map(architecture)
        exported_code.copy_remote_code(folder)
    (folder / "config.json").write_text(json.dumps(config))
    state = case_weights(name, is_sharper=is_sharper)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def build(architecture: str = "llama", **settings: Any) -> Any:
    """A model in this process, in evaluation mode, that never stops by itself."""
    prefix = find_family(architecture).exported_prefix
    model_class = getattr(modeling_ponder, f"{prefix}ForCausalLM")
    config_class = getattr(configuration_ponder, f"{prefix}Config")
    settings = {"method": "ponderlm2", "recurrent_model": True, **settings}
    if architecture in WEIGHTS:
        name = WEIGHTS[architecture]
        config = config_class(**{**case_config(name), **settings})
        state = case_weights(name, is_sharper=True)
        model = model_class.from_pretrained(None, config=config, state_dict=state)
    else:
        torch.manual_seed(5)
        model = model_class(config_class(**{**SHAPE, **settings}))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def random_ids(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Token ids, none of them the padding or the pause token: [rows, columns]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 95, (rows, columns), generator=generator)
