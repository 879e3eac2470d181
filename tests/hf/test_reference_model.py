"""Every form of every method on every architecture against the plain PyTorch reference.

The reference has earned its place in tests/golden/test_reference.py; it shares no code with the
exported files. Here for what no golden case has: GPT-2, mixtures in thoughts, accumulating ones.
"""

import pytest
import torch

from megatron_ponder.convert.exported_code import architecture_of
from tests.golden.cases import load_case
from tests.hf.exports import METHODS, WEIGHTS, build, random_ids
from tests.hf.reference import (
    GRADIENT_RELATIVE,
    LOGITS_ABSOLUTE,
    LOSS_ABSOLUTE,
    largest_difference,
)
from tests.reference.models import build_reference, loss_function

ROUNDS = 2
STOCK_NAMES = {"gpt_neox": {"lm_head.weight": "embed_out.weight"}, "gpt2": {"lm_head.weight": None}}
"""Of parameters that transformers calls otherwise, or (a tied head) has twice."""


def by_stock_name(architecture, tensors):
    names = STOCK_NAMES.get(architecture, {})
    renamed = {names.get(name, name): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in renamed.items() if name is not None}


def violations(exported, reference):
    ids = random_ids(2, 8)
    expected = reference(ids, ROUNDS)
    loss = loss_function(expected[:, :-1], ids[:, 1:])
    loss.backward()
    exported.train()
    output = exported(ids, labels=ids, num_jacobi_iterations=ROUNDS)
    output.loss.backward()
    found = []
    if (difference := largest_difference(output.logits, expected)) > LOGITS_ABSOLUTE:
        found.append(f"logits: {difference:.2e}")
    if (difference := largest_difference(output.loss, loss)) > LOSS_ABSOLUTE:
        found.append(f"loss: {difference:.2e}")
    gradients = {name: p.grad for name, p in exported.named_parameters()}
    gradients = by_stock_name(architecture_of(exported.config.model_type), gradients)
    for name, parameter in reference.named_parameters():
        scale = max(float(parameter.grad.abs().max()), 1e-5)
        difference = largest_difference(gradients[name], parameter.grad)
        if difference > GRADIENT_RELATIVE * scale:
            found.append(f"gradient of {name}: {difference:.2e} of {scale:.2e}")
    return found


def pair(architecture, method, **settings):
    """The exported model and the reference, with the same weights."""
    values = {**METHODS[method], **settings}
    exported = build(architecture, **values)
    case = load_case(WEIGHTS[architecture], **{"pause_always_scales": True, **values})
    reference = build_reference(case.config)
    reference.load_state_dict(by_stock_name(architecture, exported.state_dict()))
    return exported, reference


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", WEIGHTS)
def test_equals_the_reference(architecture, method):
    feedback = METHODS[method].get("ponderlm_feedback", "mixture")
    assert violations(*pair(architecture, method, ponderlm_feedback=feedback)) == []


@pytest.mark.parametrize("method", ["ponderlm2", "ponderlm", "pause", "interpolation"])
def test_unscaled(method):
    settings = {"scale_embeds": False, "pause_always_scales": False}
    settings["ponderlm_feedback"] = "mixture"
    assert violations(*pair("llama", method, **settings)) == []


def test_differences_are_noticed():
    exported, reference = pair("gpt2", "loop", ponderlm_feedback="mixture")
    with torch.no_grad():
        reference.get_submodule("transformer.wpe").weight[3] *= 1.01
    assert violations(exported, reference)
