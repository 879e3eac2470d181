"""The parity matrix: models, layouts, and how one is measured on the other.

Every model is small but has what a layout could get wrong: grouped queries, four layers (so that
four stages or two virtual ones have some), tied embeddings, both kinds of residual. Layouts are
those of docs/parallelism.md, each with and without recomputation.
"""

import dataclasses
from pathlib import Path

import torch

from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.schema import RunConfig
from tests.parity.measure import Measured, measure, save_weights
from tests.ranks import run_ranks

NUM_STEPS = 3
GLOBAL_BATCH_SIZE = 4
SEQ_LENGTH = 16
TIMEOUT_S = 600

COMMON = RunConfig().replaced(
    num_layers=4,
    hidden_size=32,
    num_attention_heads=4,
    vocab_size=101,
    make_vocab_size_divisible_by=16,
    seq_length=SEQ_LENGTH,
    max_position_embeddings=SEQ_LENGTH,
    global_batch_size=GLOBAL_BATCH_SIZE,
    train_iters=100,
    lr=1e-3,
    lr_warmup_iters=0,
    adam_eps=1e-5,
    clip_grad=0.1,
)
LLAMA = {"num_query_groups": 2, "ffn_hidden_size": 96}
NEOX = {
    "architecture": "gpt_neox",
    "normalization": "LayerNorm",
    "activation": "gelu",
    "add_bias_linear": True,
    "rotary_percent": 0.25,
}
GPT2 = {
    "architecture": "gpt2",
    "normalization": "LayerNorm",
    "activation": "gelu_tanh",
    "add_bias_linear": True,
    "position_embedding_type": "learned_absolute",
    "untie_embeddings_and_output_weights": False,
}
QWEN3 = LLAMA | {"architecture": "qwen3", "qk_layernorm": True, "kv_channels": 12}
LLAMA3 = LLAMA | {
    "add_attention_bias": True,
    "use_rope_scaling": True,
    "rope_scaling_original_max_position_embeddings": 64,
}
PARALLEL_RESIDUAL = {"parallel_residual": True}
K1 = {"method": "ponderlm2", "num_latent_thoughts": 1, "num_jacobi_iterations": 2}
K2 = {"method": "ponderlm2", "num_latent_thoughts": 2, "num_jacobi_iterations": 1}
VANILLA = {"method": "vanilla"}
MIXTURES = K2 | {"interpolation": True}
TOP_5 = {"interpolation_use_topk": True, "interpolation_topk": 5}
PONDERLM = {"method": "ponderlm", "num_latent_thoughts": 2}
ACCUMULATING = PONDERLM | {"residual_interpolated_embeds": True}
HIDDEN = PONDERLM | {"ponderlm_feedback": "hidden"}
LOOP = {"method": "loop", "num_latent_thoughts": 2}
PAUSE = {"method": "pause", "num_latent_thoughts": 2, "pause_token_id": 100}
MODELS = {
    "llama vanilla": LLAMA | VANILLA,
    "llama k1": LLAMA | K1,
    "llama k2": LLAMA | K2,
    "qwen3 k1": QWEN3 | K1,
    "llama3 k1": LLAMA3 | K1,
    "neox vanilla": NEOX | VANILLA | PARALLEL_RESIDUAL,
    "neox k1": NEOX | K1 | PARALLEL_RESIDUAL,
    "neox sequential k2": NEOX | K2,
    "gpt2 vanilla": GPT2 | VANILLA,
    "gpt2 k1": GPT2 | K1,
    "gpt2 k2": GPT2 | K2,
    "llama mixtures": LLAMA | MIXTURES,
    "gpt2 mixtures of 5": GPT2 | MIXTURES | TOP_5,
    "llama ponderlm": LLAMA | PONDERLM,
    "neox ponderlm of 5": NEOX | PONDERLM | TOP_5 | PARALLEL_RESIDUAL,
    "gpt2 ponderlm": GPT2 | PONDERLM,
    "llama ponderlm accumulating": LLAMA | ACCUMULATING,
    "neox ponderlm hidden": NEOX | HIDDEN | PARALLEL_RESIDUAL,
    "gpt2 ponderlm hidden": GPT2 | HIDDEN,
    "llama loop": LLAMA | LOOP,
    "neox loop": NEOX | LOOP | PARALLEL_RESIDUAL,
    "gpt2 loop": GPT2 | LOOP,
    "llama pause": LLAMA | PAUSE,
    "neox pause": NEOX | PAUSE | PARALLEL_RESIDUAL | {"pause_always_scales": False},
    "gpt2 pause": GPT2 | PAUSE,
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Ranks and the settings that spread a run over them."""

    world_size: int
    settings: dict


TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
PP4 = {"pipeline_model_parallel_size": 4}
VP2 = {"num_virtual_stages_per_pipeline_rank": 2}
CP2 = {"context_parallel_size": 2}
DIST_OPT = {"use_distributed_optimizer": True}
PAIRS = {"micro_batch_size": 2}
WHOLE = {"micro_batch_size": GLOBAL_BATCH_SIZE}
"""Fewer micro-batches, where there is neither a pipeline nor a replica to feed with more."""
LAYOUTS = {
    "TP2": Layout(2, TP2 | WHOLE),
    "TP2 + SP": Layout(2, TP2 | SP | PAIRS),
    "PP2": Layout(2, PP2),
    "PP4": Layout(4, PP4),
    "PP2, 2 virtual": Layout(2, PP2 | VP2),
    "CP2": Layout(2, CP2 | PAIRS),
    "DP2": Layout(2, {}),
    "DP2 + dist-opt": Layout(2, DIST_OPT),
    "TP2 x DP2": Layout(4, TP2),
    "TP2 + SP x DP2 + dist-opt": Layout(4, TP2 | SP | DIST_OPT),
    "TP2 x PP2": Layout(4, TP2 | PP2),
    "TP2 x CP2": Layout(4, TP2 | CP2 | PAIRS),
    "TP2 + SP x CP2": Layout(4, TP2 | SP | CP2 | PAIRS),
    "PP2 x CP2": Layout(4, PP2 | CP2),
    "TP2 x PP2 x DP2": Layout(8, TP2 | PP2),
    "TP2 + SP x PP2 x DP2 + dist-opt": Layout(8, TP2 | SP | PP2 | DIST_OPT),
}
RECOMPUTE = {
    "none": {},
    "full": {"recompute_granularity": "full"},
    "pass": {"recompute_granularity": "pass"},
}


def config_of(model: str, settings: dict, world_size: int) -> RunConfig:
    """The resolved config of a model on a layout."""
    return resolve(
        COMMON.replaced(**MODELS[model] | settings),
        world_size=world_size,
        tokenizer_vocab_size=101,
    )


def batch() -> torch.Tensor:
    """Token ids [global batch, s + 1], the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(101, (GLOBAL_BATCH_SIZE, SEQ_LENGTH + 1), generator=generator)


def measure_models(runs: dict[str, RunConfig], folder: str) -> dict[str, Measured]:
    """Measure each model from its checkpoint (inside a rank)."""
    return {
        model: measure(config, f"{folder}/{model}", batch(), NUM_STEPS)
        for model, config in runs.items()
    }


def measure_layout(layout: Layout, models: list[str], folder: str) -> list[dict[str, Measured]]:
    """Every model on one layout, by rank."""
    runs = {m: config_of(m, layout.settings, layout.world_size) for m in models}
    return run_ranks(measure_models, layout.world_size, runs, folder, timeout_s=TIMEOUT_S)


def write_checkpoints(runs: dict[str, RunConfig], folder: str) -> None:
    """Write each model's initial weights (inside a single rank)."""
    for model, config in runs.items():
        save_weights(config, None, f"{folder}/{model}")


def prepare_checkpoints(folder: Path) -> None:
    """A checkpoint per model in `folder`."""
    for model in MODELS:
        (folder / model).mkdir()
    run_ranks(write_checkpoints, 1, {m: config_of(m, {}, 1) for m in MODELS}, str(folder))
