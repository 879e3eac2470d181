"""Our model against the plain PyTorch reference, on shapes that no golden case has.

The reference has earned its place in tests/golden/test_reference.py. Weights are drawn in it and
loaded here through the Hugging Face name tables.
"""

import torch

from megatron_ponder.convert.weight_names import to_huggingface, to_megatron
from megatron_ponder.model.build import build_model
from megatron_ponder.parallel.parallel_model import wrap_data_parallel
from megatron_ponder.parallel.schedule import run_microbatches
from megatron_ponder.runtime import distributed
from tests.parity.layouts import GPT2, LLAMA, NEOX, SEQ_LENGTH, VANILLA, config_of
from tests.parity.measure import gather_gradients, gather_logits
from tests.parity.tolerances import (
    GRADIENT_RELATIVE,
    LOGITS_ABSOLUTE,
    LOSS_ABSOLUTE,
    gradient_violations,
    largest_difference,
)
from tests.ranks import run_ranks
from tests.reference.models import build_reference, loss_function


def thoughts(k: int, r: int, **settings: object) -> dict:
    return {
        "method": "ponderlm2",
        "num_latent_thoughts": k,
        "num_jacobi_iterations": r,
        **settings,
    }


def passes(k: int, method: str, **settings: object) -> dict:
    return {"method": method, "num_latent_thoughts": k, **settings}


MIX_7 = {"interpolation_use_topk": True, "interpolation_topk": 7}
CASES = {
    "llama, grouped queries, k0": LLAMA | thoughts(0, 3),
    "llama, grouped queries, k1 r0": LLAMA | thoughts(1, 0),
    "llama, grouped queries, k1 r3": LLAMA | thoughts(1, 3),
    "llama, one group, k3 r2": LLAMA | thoughts(3, 2) | {"num_query_groups": 1},
    "llama, unscaled, k1 r2": LLAMA | thoughts(1, 2, scale_embeds=False),
    "llama, heads of their own width": LLAMA | thoughts(1, 1) | {"kv_channels": 6},
    "llama vanilla": LLAMA | VANILLA,
    "neox sequential k1 r2": NEOX | thoughts(1, 2),
    "neox parallel k2 r4": NEOX | thoughts(2, 4) | {"parallel_residual": True},
    "neox, all channels rotated, other base": NEOX
    | thoughts(1, 1)
    | {"rotary_percent": 1.0, "rotary_base": 500.0},
    "gpt2 k1 r3": GPT2 | thoughts(1, 3),
    "gpt2 k2 r0": GPT2 | thoughts(2, 0),
    "llama, mixtures, k2 r1": LLAMA | thoughts(2, 1, interpolation=True),
    "gpt2, mixtures, unscaled, k1 r1": GPT2
    | thoughts(1, 1, interpolation=True, scale_embeds=False),
    "neox, mixtures of 7, k1 r2": NEOX | thoughts(1, 2, **MIX_7, interpolation=True),
    "llama ponderlm k1": LLAMA | passes(1, "ponderlm"),
    "llama ponderlm, mixtures of 7, k2": LLAMA | passes(2, "ponderlm", **MIX_7),
    "neox ponderlm, accumulating, k3": NEOX
    | passes(3, "ponderlm", residual_interpolated_embeds=True),
    "gpt2 ponderlm k2": GPT2 | passes(2, "ponderlm"),
    "gpt2 ponderlm, hidden states, k2": GPT2 | passes(2, "ponderlm", ponderlm_feedback="hidden"),
    "llama loop k3": LLAMA | passes(3, "loop"),
    "gpt2 loop k2": GPT2 | passes(2, "loop", scale_embeds=False),
    "gpt2 pause k3": GPT2 | passes(3, "pause", pause_token_id=100),
    "neox pause, unscaled, k1": NEOX
    | passes(1, "pause", pause_token_id=7, pause_always_scales=False, scale_embeds=False),
    "llama pause k0": LLAMA | passes(0, "pause", pause_token_id=7),
}


def differences(name: str, off_by_one: bool = False) -> list[str]:
    """Where logits, loss or a gradient differ; inside a rank.

    Args:
        name: of the case.
        off_by_one: plant a fault: one Jacobi iteration more in our model.
    """
    config = config_of("llama vanilla", {}, 1).replaced(
        num_query_groups=4, ffn_hidden_size=128, kv_channels=8
    )
    config = config.replaced(**CASES[name])
    torch.manual_seed(3)
    reference = build_reference(config)
    with torch.no_grad():
        # Large enough for thoughts to matter, with logits of order 1; norms around 1.
        for parameter in reference.parameters():
            is_norm = parameter.dim() == 1 and bool((parameter == 1).all())
            parameter.normal_(mean=float(is_norm), std=0.1)
    tokens = torch.randint(config.model.vocab_size, (2, SEQ_LENGTH + 1))
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    r = config.method.num_jacobi_iterations
    expected_logits = reference(inputs, r)
    expected_loss = loss_function(expected_logits, labels)
    expected_loss.backward()
    expected = {key: p.grad for key, p in reference.named_parameters()}

    distributed.initialize(config.parallel, seed=1)
    model = build_model(config)
    weights = {key: p.detach() for key, p in reference.named_parameters()}
    model.load_state_dict(to_megatron(weights, config.model), strict=False)
    wrapped = wrap_data_parallel([model], config)
    plan = model.method.plan(r + off_by_one)
    logits = gather_logits(wrapped, config, inputs, plan)
    totals = run_microbatches(
        wrapped,
        iter([{"tokens": inputs, "labels": labels, "loss_mask": torch.ones(inputs.shape)}]),
        plan=plan,
        num_microbatches=1,
        micro_batch_size=2,
        seq_length=SEQ_LENGTH,
    )
    gradients = to_huggingface(gather_gradients(wrapped), config.model)
    found = []
    if (difference := largest_difference(logits, expected_logits.detach())) > LOGITS_ABSOLUTE:
        found.append(f"logits: {difference:.2e}")
    if not abs(float(totals[0] / totals[1]) - expected_loss.item()) <= LOSS_ABSOLUTE:
        found.append(f"loss: {float(totals[0] / totals[1])} against {expected_loss.item()}")
    return found + gradient_violations(gradients, expected, GRADIENT_RELATIVE)


def all_differences() -> dict[str, list[str]]:
    """Every case."""
    return {name: differences(name) for name in CASES}


def test_equals_the_reference() -> None:
    """Logits, loss and every gradient."""
    (found,) = run_ranks(all_differences, 1)
    assert not any(found.values()), found


def test_one_iteration_more_is_caught() -> None:
    (found,) = run_ranks(differences, 1, "llama, grouped queries, k1 r3", True)
    assert found
