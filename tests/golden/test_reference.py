"""The plain PyTorch reference against the authors' code, and against thinking one slot at a time.

The reference is the oracle of tests/parity/test_reference_model.py for shapes without a golden
case; here it earns that.
"""

import pytest
import torch
from torch import Tensor

from tests.golden.cases import NAMES, Case, load_case
from tests.parity.tolerances import (
    GOLDEN_GRADIENT_RELATIVE,
    LOGITS_ABSOLUTE,
    LOSS_ABSOLUTE,
    gradient_violations,
    largest_difference,
)
from tests.reference.models import ReferenceModel, build_reference, loss_function

SEQUENTIAL = ["llama_ponderlm2_k2_j2", "gpt_neox_ponderlm2_k1_j3"]


def load_reference(case: Case) -> ReferenceModel:
    """The reference with a case's weights; GPT-2's repeat the tied head."""
    model = build_reference(case.config)
    weights = {k: w for k, w in case.weights.items() if k in dict(model.named_parameters())}
    assert case.weights.keys() - weights.keys() <= {"lm_head.weight"}
    model.load_state_dict(weights)
    return model


def violations(case: Case, model: ReferenceModel) -> list[str]:
    """Where logits, loss and gradients of the reference differ from a case's."""
    r = case.config.method.num_jacobi_iterations
    logits = model(case.input_ids, r)
    loss = loss_function(logits[:, :-1], case.input_ids[:, 1:])
    loss.backward()
    found = []
    if (difference := largest_difference(logits.detach(), case.logits)) > LOGITS_ABSOLUTE:
        found.append(f"logits: {difference:.2e}")
    if not abs(loss.item() - case.loss) <= LOSS_ABSOLUTE:
        found.append(f"loss: {loss.item()} against {case.loss}")
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return found + gradient_violations(gradients, case.gradients, GOLDEN_GRADIENT_RELATIVE)


@pytest.mark.parametrize("name", NAMES)
def test_equals_the_authors_code(name):
    """Logits, loss and every gradient."""
    case = load_case(name)
    assert not violations(case, load_reference(case))


@pytest.mark.parametrize("fault", ["unscaled", "one pass more", "unread thought"])
def test_planted_faults_are_caught(fault, monkeypatch):
    """The comparison above has teeth."""
    case = load_case("llama_ponderlm2_k2_j2")
    model = load_reference(case)
    if fault == "unscaled":
        model.has_scaled_embeddings = False
    elif fault == "one pass more":
        forward = model.forward
        monkeypatch.setattr(model, "forward", lambda tokens, r: forward(tokens, r + 1))
    else:
        think = model.think
        last = slice(model.num_thoughts, model.num_thoughts + 1)

        def misread(stages: Tensor, kept: slice) -> Tensor:
            return think(stages, slice(0, 1) if kept == last else kept)

        monkeypatch.setattr(model, "think", misread)
    assert violations(case, model)


@torch.no_grad()
def think_one_slot_at_a_time(model: ReferenceModel, tokens: Tensor) -> Tensor:
    """Logits [b, s, v] by the definition: one run through the layers per slot, in order."""
    embeddings = model.embed(tokens)
    norm = model.get_submodule(model.final_norm)
    slots, positions, read = [], [], []
    for t in range(tokens.size(1)):
        following = embeddings[:, t]
        for _ in range(model.num_thoughts + 1):
            slots.append(following)
            positions.append(t)
            hidden = model.run_layers(torch.stack(slots, dim=1), torch.tensor(positions))
            following = norm(hidden)[:, -1]
        read.append(following)
    weight = model.get_submodule(model.head).weight
    return torch.stack(read, dim=1) @ weight.t()


@pytest.mark.parametrize("name", SEQUENTIAL)
def test_equals_sequential_thinking_after_enough_iterations(name):
    """R = K (s - 1) Jacobi iterations reach the fixed point; one iteration does not."""
    case = load_case(name)
    model = load_reference(case).eval()
    tokens = case.input_ids[:, :8]
    sequential = think_one_slot_at_a_time(model, tokens)
    with torch.no_grad():
        enough = model(tokens, model.num_thoughts * (tokens.size(1) - 1))
        too_few = model(tokens, 0)
    assert largest_difference(enough, sequential) <= LOGITS_ABSOLUTE
    assert largest_difference(too_few, sequential) > 100 * LOGITS_ABSOLUTE
