"""Small random models of every stock architecture, with what conversion could get wrong."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

SIZES: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA = SIZES | {"num_key_value_heads": 2}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", LLAMA | {"rms_norm_eps": 1e-5}),
    "llama 3, tied, head of its own width": (
        "LlamaConfig",
        LLAMA | {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 12},
    ),
    "llama, attention biases, linear rope": (
        "LlamaConfig",
        LLAMA
        | {
            "attention_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        },
    ),
    "llama, all biases": ("LlamaConfig", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", LLAMA | {"sliding_window": None, "head_dim": 16}),
    "mistral, window as long as it gets": ("MistralConfig", LLAMA | {"sliding_window": 64}),
    "qwen2": ("Qwen2Config", LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", LLAMA | {"head_dim": 12}),
    "qwen3, biases": ("Qwen3Config", LLAMA | {"head_dim": 12, "attention_bias": True}),
    "gpt_neox": ("GPTNeoXConfig", SIZES),
    "gpt_neox, sequential, all rotated": (
        "GPTNeoXConfig",
        SIZES
        | {
            "use_parallel_residual": False,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e4,
                "partial_rotary_factor": 1.0,
            },
        },
    ),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 101, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64},
    ),
    "gpt2, untied": (
        "GPT2Config",
        {"vocab_size": 101, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
        | {"n_inner": 80, "tie_word_embeddings": False},
    ),
}


def stock_config(name: str) -> PretrainedConfig:
    class_name, settings = MODELS[name]
    return getattr(transformers, class_name)(**settings)


def build_stock_model(name: str) -> PreTrainedModel:
    """With weights large enough for every one to matter, and logits of order 1."""
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(stock_config(name)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            is_norm = parameter.dim() == 1 and bool((parameter == 1).all())
            parameter.normal_(mean=float(is_norm), std=0.1)
    return model


def write_stock_model(name: str, folder: Path, **arguments: Any) -> None:
    """As transformers saves it; arguments of save_pretrained."""
    build_stock_model(name).save_pretrained(folder, **arguments)
