"""Greedy generation against the authors' code: the same tokens, the same logits at every step.

Their numbers are for Llama and ponderlm2 (`generated`, `step_logits`): six tokens of a prompt, then
eight that follow with a cache.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_ponder.convert.weight_names import to_megatron
from megatron_ponder.inference.continuation import continuation
from megatron_ponder.model.build import build_model
from megatron_ponder.runtime import distributed
from tests.golden.cases import FOLDER, NAMES, load_case
from tests.parity.measure import load_weights, save_weights
from tests.parity.tolerances import LOGITS_ABSOLUTE, largest_difference
from tests.ranks import run_ranks

PROMPT_TOKENS = 6
GENERATED = [name for name in NAMES if "generated" in load_file(FOLDER / name / "case.safetensors")]


def write_checkpoints(folder: str) -> None:
    """Inside a rank."""
    for name in GENERATED:
        case = load_case(name)
        save_weights(case.config, to_megatron(case.weights, case.config.model), f"{folder}/{name}")


def violations(folder: str, settings: dict) -> dict[str, list[str]]:
    """Where each case differs on this layout; inside a rank."""
    found = {}
    for name in GENERATED:
        case = load_case(name, **settings)
        expected = load_file(FOLDER / name / "case.safetensors")
        distributed.initialize(case.config.parallel, seed=1)
        model = build_model(case.config)
        load_weights([model], f"{folder}/{name}")
        model.eval()
        plan = model.method.plan(case.config.method.num_jacobi_iterations)
        prompt = case.input_ids[0, :PROMPT_TOKENS]
        with continuation(model, plan) as growing:
            logits = [growing.begin([prompt])]
            ids = [int(logits[0].argmax())]
            while len(logits) < expected["step_logits"].size(1):
                logits.append(growing.add(ids[-1:]))
                ids.append(int(logits[-1].argmax()))
        found[name] = []
        if prompt.tolist() + ids != expected["generated"][0].tolist():
            found[name].append(f"tokens: {ids}")
        steps = torch.cat(logits).cpu()
        difference = largest_difference(steps, expected["step_logits"][0])
        if difference > LOGITS_ABSOLUTE:
            found[name].append(f"logits: {difference:.2e}")
    return found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> str:
    folder: Path = tmp_path_factory.mktemp("generated")
    for name in GENERATED:
        (folder / name).mkdir()
    run_ranks(write_checkpoints, 1, str(folder))
    return str(folder)


@pytest.mark.parametrize("tp", [1, 2])
def test_equals_the_authors_code(tp, checkpoints) -> None:
    assert len(GENERATED) == 3
    settings = {"tensor_model_parallel_size": tp}
    for found in run_ranks(violations, tp, checkpoints, settings):
        assert not any(found.values()), found
