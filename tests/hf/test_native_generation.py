"""Greedy generation here and in transformers, from the same weights: token for token.

Each golden case is exported and continued by both, row by row and as a batch of unequal prompts
(padded on the left there, on the right here). Where learned positions allow; logits behind the
prompt are compared besides, so that agreement is no accident of a sharp choice.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_ponder.convert.weight_names import to_megatron
from megatron_ponder.inference.continuation import continuation
from megatron_ponder.model.build import build_model
from megatron_ponder.runtime import distributed
from tests.golden.cases import NAMES, load_case
from tests.hf.exports import export_case
from tests.parity.tolerances import LOGITS_ABSOLUTE, largest_difference
from tests.ranks import run_ranks

PROMPT_TOKENS = (6, 3)
NEW_TOKENS = 6


def native(name: str) -> tuple[list[list[int]], torch.Tensor]:
    """New tokens of both rows, continued together, and the logits behind the prompts."""
    case = load_case(name)
    distributed.initialize(case.config.parallel, seed=1)
    model = build_model(case.config)
    model.load_state_dict(to_megatron(case.weights, case.config.model), strict=False)
    model.eval()
    plan = model.method.plan(case.config.method.num_jacobi_iterations)
    prompts = [row[:n] for row, n in zip(case.input_ids, PROMPT_TOKENS, strict=True)]
    with continuation(model, plan) as growing:
        first = logits = growing.begin(prompts)
        new = [logits.argmax(dim=-1).tolist()]
        while len(new) < NEW_TOKENS:
            logits = growing.add(new[-1])
            new.append(logits.argmax(dim=-1).tolist())
    return [list(row) for row in zip(*new, strict=True)], first


def all_native() -> dict[str, tuple[list[list[int]], torch.Tensor]]:
    """Inside a rank."""
    return {name: native(name) for name in NAMES}


@pytest.fixture(scope="module")
def ours() -> dict[str, tuple[list[list[int]], torch.Tensor]]:
    return run_ranks(all_native, 1)[0]


@pytest.mark.parametrize("name", NAMES)
def test_token_for_token(name: str, ours, tmp_path: Path) -> None:
    folder = export_case(name, tmp_path / name)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    ids = load_case(name).input_ids
    longest = max(PROMPT_TOKENS)
    rows = torch.zeros(len(ids), longest, dtype=torch.long)
    mask = torch.zeros_like(rows)
    for row, num_tokens in enumerate(PROMPT_TOKENS):
        rows[row, longest - num_tokens :] = ids[row, :num_tokens]
        mask[row, longest - num_tokens :] = 1
    generated = model.generate(
        rows,
        attention_mask=mask,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new, first = ours[name]
    assert largest_difference(generated.logits[0], first) <= LOGITS_ABSOLUTE
    assert generated.sequences[:, longest:].tolist() == new
