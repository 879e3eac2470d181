"""A method that the package has never heard of works on every kind of layout.

`tests.methods.echo` is named by --method and nothing else; docs/adding-a-method.md shows it.
"""

from pathlib import Path

import pytest
import torch

from megatron_ponder.config.resolve import resolve
from tests.methods import echo
from tests.parity.faults import FAULTS
from tests.parity.layouts import (
    COMMON,
    GPT2,
    LAYOUTS,
    LLAMA,
    NUM_STEPS,
    Layout,
    batch,
    write_checkpoints,
)
from tests.parity.measure import Measured, measure
from tests.parity.tolerances import violations
from tests.ranks import run_ranks

ALONE = Layout(1, {})
ECHO = {"method": "tests.methods.echo", "num_latent_thoughts": 2}
MODELS = {"llama": LLAMA | ECHO, "gpt2": GPT2 | ECHO}
DOCUMENT = Path(__file__).parents[2] / "docs" / "adding-a-method.md"


def config_of(model: str, layout: Layout, **changes: object):
    config = COMMON.replaced(**{**MODELS[model], **layout.settings, **changes})
    return resolve(config, world_size=layout.world_size, tokenizer_vocab_size=101)


def measure_models(runs: dict, folder: str, fault: str | None = None) -> dict[str, Measured]:
    return {
        model: measure(config, f"{folder}/{model}", batch(), NUM_STEPS, fault)
        for model, config in runs.items()
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("echo")
    for model in MODELS:
        (path / model).mkdir()
    run_ranks(write_checkpoints, 1, {m: config_of(m, ALONE) for m in MODELS}, str(path))
    return str(path)


@pytest.fixture(scope="module")
def alone(folder) -> dict[str, Measured]:
    return run_ranks(measure_models, 1, {m: config_of(m, ALONE) for m in MODELS}, folder)[0]


@pytest.mark.parametrize("name", ["TP2", "TP2 + SP", "PP2", "CP2"])
def test_every_layout_equals_one_process(name, folder, alone) -> None:
    layout = LAYOUTS[name]
    runs = {model: config_of(model, layout) for model in MODELS}
    for by_model in run_ranks(measure_models, layout.world_size, runs, folder):
        for model, numbers in by_model.items():
            assert not violations(numbers, alone[model]), (name, model)


def test_it_is_a_method_of_its_own(folder, alone) -> None:
    """Without its echoes, or with a fault in them, the numbers are others."""
    assert "skipped norm" in FAULTS
    runs = {"llama": config_of("llama", ALONE)}
    (faulty,) = run_ranks(measure_models, 1, runs, folder, "skipped norm")
    assert violations(faulty["llama"], alone["llama"])
    runs = {"llama": config_of("llama", ALONE, num_latent_thoughts=0)}
    (silent,) = run_ranks(measure_models, 1, runs, folder)
    assert violations(silent["llama"], alone["llama"])
    assert alone["llama"].losses[-1] < alone["llama"].losses[0]
    assert torch.isfinite(alone["llama"].logits).all()


def test_the_document_shows_the_file() -> None:
    source = Path(echo.__file__).read_text()
    assert source.count("\n") < 100
    assert f"```python\n{source}```" in DOCUMENT.read_text()
