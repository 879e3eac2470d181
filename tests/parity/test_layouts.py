"""Every layout gives the numbers of one process: tensor, sequence and data parallelism.

One checkpoint is loaded everywhere. Each layout's ranks start once and run every model; see
tests/parity/measure.py for what is compared and tolerances.py for how closely.
"""

import dataclasses

import pytest
import torch

from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.schema import RunConfig
from tests.parity.measure import Measured, measure, save_weights
from tests.parity.tolerances import violations
from tests.ranks import run_ranks

NUM_STEPS = 5
GLOBAL_BATCH_SIZE = 4
SEQ_LENGTH = 16

COMMON = RunConfig().replaced(
    num_layers=2,
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
K1 = {"method": "ponderlm2", "num_latent_thoughts": 1, "num_jacobi_iterations": 2}
K2 = {"method": "ponderlm2", "num_latent_thoughts": 2, "num_jacobi_iterations": 1}
VANILLA = {"method": "vanilla"}
MODELS = {
    "llama vanilla": LLAMA | VANILLA,
    "llama k1": LLAMA | K1,
    "llama k2": LLAMA | K2,
    "neox parallel k1": NEOX | K1 | {"parallel_residual": True},
    "neox sequential k2": NEOX | K2,
    "gpt2 vanilla": GPT2 | VANILLA,
    "gpt2 k2": GPT2 | K2,
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Ranks and the settings that spread a run over them."""

    world_size: int
    settings: dict


TP2 = {"tensor_model_parallel_size": 2}
SP = {"sequence_parallel": True}
DIST_OPT = {"use_distributed_optimizer": True}
LAYOUTS = {
    "tp2": Layout(2, TP2),
    "tp2 sp": Layout(2, TP2 | SP),
    "dp2": Layout(2, {}),
    "dp2 dist-opt": Layout(2, DIST_OPT),
    "tp2 dp2": Layout(4, TP2),
    "tp2 sp dp2 dist-opt": Layout(4, TP2 | SP | DIST_OPT),
}


def config_of(model: str, settings: dict, world_size: int) -> RunConfig:
    """The resolved config of a model on a layout."""
    return resolve(
        COMMON.replaced(**MODELS[model], **settings),
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


def write_checkpoints(runs: dict[str, RunConfig], folder: str) -> None:
    """Write each model's initial weights (inside a single rank)."""
    for model, config in runs.items():
        save_weights(config, None, f"{folder}/{model}")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with a checkpoint per model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for model in MODELS:
        (folder / model).mkdir()
    run_ranks(write_checkpoints, 1, {m: config_of(m, {}, 1) for m in MODELS}, str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def single_process(checkpoints):
    """The one truth."""
    return run_ranks(measure_models, 1, {m: config_of(m, {}, 1) for m in MODELS}, checkpoints)[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_single_process(name, checkpoints, single_process):
    """Logits, loss, gradient norms, every gradient and the weights after five steps."""
    layout = LAYOUTS[name]
    runs = {m: config_of(m, layout.settings, layout.world_size) for m in MODELS}
    by_rank = run_ranks(measure_models, layout.world_size, runs, checkpoints)
    for measured in by_rank:
        for model in MODELS:
            found = violations(measured[model], single_process[model])
            assert not found, f"{name}, {model}: " + "; ".join(found)


FAULTS_BY_LAYOUT = {
    "dp2": ["shifted label", "position per slot", "skipped norm", "loss at first stage"],
    "tp2": ["unscaled embedding", "one pass short"],
    "tp2 sp": ["norm gradients not summed"],
}


def measure_faults(config: RunConfig, faults: list[str], folder: str) -> dict[str, Measured]:
    """Measure one model once per planted fault (inside a rank)."""
    return {fault: measure(config, folder, batch(), NUM_STEPS, fault) for fault in faults}


@pytest.mark.parametrize("name", FAULTS_BY_LAYOUT)
@pytest.mark.parametrize("model", ["llama k2", "gpt2 k2"])
def test_planted_faults_are_caught(name, model, checkpoints, single_process):
    """The comparison above has teeth."""
    layout = LAYOUTS[name]
    config = config_of(model, layout.settings, layout.world_size)
    faults = FAULTS_BY_LAYOUT[name]
    measured = run_ranks(
        measure_faults, layout.world_size, config, faults, f"{checkpoints}/{model}"
    )[0]
    missed = [fault for fault in faults if not violations(measured[fault], single_process[model])]
    assert not missed, f"not caught: {missed}"
