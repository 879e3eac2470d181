"""Exported golden cases against the authors' numbers, through AutoModelForCausalLM; and faults."""

import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.hf.exports import CASES, NAMES, export_case
from tests.hf.faults import FAULTS, plant
from tests.hf.reference import (
    GRADIENT_RELATIVE,
    LOGITS_ABSOLUTE,
    LOSS_ABSOLUTE,
    largest_difference,
)

WITH_THOUGHTS = [name for name in NAMES if name.startswith("llama_ponderlm2")]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return {name: export_case(name, folder / name) for name in NAMES}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def generation_violations(model, case):
    """Eight tokens on a cache; then again in two turns, with padding before the prompt."""
    settings = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    settings["eos_token_id"] = None
    prompt, expected = case["input_ids"][:1, :6], case["generated"]
    output = model.generate(prompt, max_new_tokens=8, **settings)
    found = [] if torch.equal(output.sequences, expected) else ["generated tokens"]
    steps = torch.stack(output.logits, dim=1)
    if (difference := largest_difference(steps, case["step_logits"])) > LOGITS_ABSOLUTE:
        found.append(f"logits of generation: {difference:.2e}")
    if (seen := output.past_key_values.get_seq_length()) != 13:
        return [*found, f"{seen} tokens seen, not 13"]
    ids, cache = torch.cat((torch.zeros(1, 3, dtype=torch.long), prompt), dim=1), None
    for _ in range(2):
        mask = torch.cat((torch.zeros(1, 3), torch.ones(1, ids.size(1) - 3)), dim=1).long()
        output = model.generate(
            ids, attention_mask=mask, max_new_tokens=4, past_key_values=cache, **settings
        )
        ids, cache = output.sequences, output.past_key_values
    return found if torch.equal(ids[:, 3:], expected) else [*found, "tokens of a second turn"]


def violations(model, name):
    """Where a model differs from a case: logits, loss, gradients, generation."""
    case = load_file(CASES / name / "case.safetensors")
    ids = case["input_ids"]
    found = []
    model.eval()
    if (difference := largest_difference(model(ids).logits, case["logits"])) > LOGITS_ABSOLUTE:
        found.append(f"logits: {difference:.2e}")
    if "generated" in case:
        try:
            found += generation_violations(model, case)
        except ValueError as error:
            found.append(f"generation: {error}")
    model.train()
    loss = model(ids, labels=ids).loss
    if not math.isclose(loss.item(), case["loss"].item(), abs_tol=LOSS_ABSOLUTE):
        found.append(f"loss: {loss.item()}")
    loss.backward()
    gradients = {key: p.grad for key, p in model.named_parameters()}
    for key in [key for key in case if key.startswith("grad.")]:
        name = key.removeprefix("grad.")
        # transformers 5 calls GPT-NeoX's head lm_head
        actual = gradients.pop(name if name in gradients else "lm_head.weight")
        scale = max(float(case[key].abs().max()), 1e-6)
        if (difference := largest_difference(actual, case[key])) > GRADIENT_RELATIVE * scale:
            found.append(f"gradient of {name}: {difference:.2e} of {scale:.2e}")
    return found + [f"unexpected gradient of {name}" for name in gradients]


def test_all_cases_are_tried():
    assert len(NAMES) == 14 and len(WITH_THOUGHTS) == 3


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_authors_code(name, folders):
    model = load(folders[name])
    assert type(model).__name__.startswith("Ponder") == (not name.endswith("vanilla"))
    assert violations(model, name) == []


@pytest.mark.parametrize(
    ("fault", "name"), [(fault, name) for fault in FAULTS for name in FAULTS[fault].cases]
)
def test_planted_faults_are_caught(fault, name, folders):
    model = load(folders[name])
    with plant(FAULTS[fault], model):
        assert violations(model, name)
    model.zero_grad()
    assert violations(model, name) == []
