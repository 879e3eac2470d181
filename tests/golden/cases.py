"""The golden cases: numbers of the PonderLM-2 authors' code, as our settings and tensors.

`cases/NAME/` holds the Hugging Face config and weights of a small random model, token ids, and what
the authors' code (stock transformers for vanilla) computed from them on CPU in fp32.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.schema import RunConfig

FOLDER = Path(__file__).parent / "cases"
NAMES = sorted(path.name for path in FOLDER.iterdir())

_LAYER_NORM = {"normalization": "LayerNorm", "add_bias_linear": True}
_BY_ARCHITECTURE: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt_neox": {
        "activation": "gelu",
        # What the authors' GPT-NeoX files do differently: named settings here (docs/methods.md).
        "pause_always_scales": False,
        "ponderlm_feedback": "hidden",
        **_LAYER_NORM,
    },
    "gpt2": {
        "activation": "gelu_tanh",
        "position_embedding_type": "learned_absolute",
        "untie_embeddings_and_output_weights": False,
        **_LAYER_NORM,
    },
}
_KEYS = {
    "hidden_size": ("hidden_size", "n_embd"),
    "num_layers": ("num_hidden_layers", "n_layer"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "num_query_groups": ("num_key_value_heads",),
    "ffn_hidden_size": ("intermediate_size",),
    "vocab_size": ("vocab_size",),
    "max_position_embeddings": ("max_position_embeddings", "n_positions"),
    "norm_epsilon": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    "rotary_base": ("rope_theta",),
    "rotary_percent": ("rotary_pct",),
    "parallel_residual": ("use_parallel_residual",),
    "method": ("method",),
    "num_latent_thoughts": ("num_latent_thoughts",),
    "num_jacobi_iterations": ("num_jacobi_iterations",),
    "scale_embeds": ("scale_embeds",),
    "interpolation": ("interpolation",),
    "pause_token_id": ("pause_token_id",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One golden case."""

    config: RunConfig
    """Resolved for one process."""
    weights: dict[str, Tensor]
    """By Hugging Face name."""
    input_ids: Tensor
    """int64 [2, 12]; also the labels, which the loss shifts by one token."""
    logits: Tensor
    """[2, 12, v] in evaluation mode."""
    loss: float
    """Mean next-token cross entropy in training mode."""
    gradients: dict[str, Tensor]
    """Of the loss, by Hugging Face name."""


def load_case(name: str, **settings: Any) -> Case:
    """A case by folder name; `settings` change its config before it is resolved."""
    folder = FOLDER / name
    stored = json.loads((folder / "config.json").read_text())
    numbers = load_file(folder / "case.safetensors")
    values = {
        ours: stored[theirs]
        for ours, names in _KEYS.items()
        for theirs in names
        if theirs in stored
    }
    architecture = stored["model_type"]
    config = RunConfig().replaced(
        architecture=architecture,
        seq_length=numbers["input_ids"].size(1),
        **_BY_ARCHITECTURE[architecture],
        **values,
    )
    world_size = math.prod(
        settings.get(f"{kind}_model_parallel_size", 1) for kind in ("tensor", "pipeline")
    )
    config = config.replaced(**settings)
    return Case(
        config=resolve(config, world_size=world_size, tokenizer_vocab_size=None),
        weights=load_file(folder / "model.safetensors"),
        input_ids=numbers["input_ids"],
        logits=numbers["logits"],
        loss=float(numbers["loss"]),
        gradients={k.removeprefix("grad."): t for k, t in numbers.items() if k.startswith("grad.")},
    )
