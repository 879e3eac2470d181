"""Named shapes: every model of the paper, of Pythia and of GPT-2. A preset is a set of flags.

Sources: Llama shapes and initialisation are the PonderLM-2 authors' (vocabulary of the GPT-NeoX
tokenizer); Pythia's are EleutherAI's (arXiv 2304.01373, and their configs); GPT-2's are OpenAI's.
Presets set the shape, and those settings of the method and the initialisation that the authors'
code has different for different architectures. The recipe of a run (learning rate, batch) is not
part of a preset: see examples/.
"""

from typing import Any

Preset = dict[str, Any]

LLAMA: Preset = {
    "architecture": "llama",
    "vocab_size": 50304,
    "rotary_base": 10000.0,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-5,
    "activation": "swiglu",
    "min_jacobi_iterations": 2,
    "max_jacobi_iterations": 3,
}
PYTHIA: Preset = {
    "architecture": "gpt_neox",
    "vocab_size": 50304,
    "rotary_base": 10000.0,
    "rotary_percent": 0.25,
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-5,
    "activation": "gelu",
    "add_bias_linear": True,
    "parallel_residual": True,
    "max_position_embeddings": 2048,
    "min_jacobi_iterations": 2,
    "max_jacobi_iterations": 4,
    "small_init_depth_counts_thoughts": True,
    "pause_always_scales": False,
    "pause_init_method": "normal",
}
GPT2: Preset = {
    "architecture": "gpt2",
    "vocab_size": 50257,
    "position_embedding_type": "learned_absolute",
    "max_position_embeddings": 1024,
    "normalization": "LayerNorm",
    "norm_epsilon": 1e-5,
    "activation": "gelu_tanh",
    "add_bias_linear": True,
    "untie_embeddings_and_output_weights": False,
    "min_jacobi_iterations": 2,
    "max_jacobi_iterations": 3,
}


def _shape(base: Preset, hidden: int, ffn: int, layers: int, heads: int, std: float) -> Preset:
    """One row of a table of shapes."""
    return base | {
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_layers": layers,
        "num_attention_heads": heads,
        "init_method_std": std,
    }


AUTHORS: dict[str, Preset] = {
    "llama": {"norm_epsilon": 0.1, "eod_as_target": False},
    "gpt_neox": {"eod_as_target": False, "ponderlm_feedback": "hidden"},
}
"""What the authors' files have otherwise than our defaults, by architecture: --reproduce-authors.
ponderlm_feedback matters to the method ponderlm only."""

# Rows: hidden_size, ffn_hidden_size, num_layers, num_attention_heads, init_method_std (used by
# vanilla only; the authors take 0.01 from 834m on).
PRESETS: dict[str, Preset] = {
    "llama-125m": _shape(LLAMA, 768, 2064, 12, 12, 0.02),
    "llama-410m": _shape(LLAMA, 1024, 2752, 24, 16, 0.02),
    "llama-410m-x2depth": _shape(LLAMA, 1024, 2752, 48, 16, 0.02),
    "llama-834m": _shape(LLAMA, 1536, 4128, 24, 24, 0.01),
    "llama-1.4b": _shape(LLAMA, 2048, 5504, 24, 32, 0.01),
    "llama-2.8b": _shape(LLAMA, 2048, 5504, 48, 32, 0.01),
    "pythia-14m": _shape(PYTHIA, 128, 512, 6, 4, 0.02),
    "pythia-31m": _shape(PYTHIA, 256, 1024, 6, 8, 0.02),
    "pythia-70m": _shape(PYTHIA, 512, 2048, 6, 8, 0.02),
    "pythia-160m": _shape(PYTHIA, 768, 3072, 12, 12, 0.02),
    "pythia-410m": _shape(PYTHIA, 1024, 4096, 24, 16, 0.02),
    "pythia-1b": _shape(PYTHIA, 2048, 8192, 16, 8, 0.01),
    "pythia-1.4b": _shape(PYTHIA, 2048, 8192, 24, 16, 0.01),
    "pythia-2.8b": _shape(PYTHIA, 2560, 10240, 32, 32, 0.01),
    "pythia-6.9b": _shape(PYTHIA, 4096, 16384, 32, 32, 0.01),
    "pythia-12b": _shape(PYTHIA, 5120, 20480, 36, 40, 0.01),
    "gpt2": _shape(GPT2, 768, 3072, 12, 12, 0.02),
    "gpt2-medium": _shape(GPT2, 1024, 4096, 24, 16, 0.02),
    "gpt2-large": _shape(GPT2, 1280, 5120, 36, 20, 0.02),
    "gpt2-xl": _shape(GPT2, 1600, 6400, 48, 25, 0.02),
}
