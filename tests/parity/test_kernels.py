"""Models on Triton's kernels give the numbers of models on torch, here in Triton's interpreter.

The twin of tests/gpu/test_kernels.py, which runs the compiled kernels where there is a GPU.
"""

import pytest

from megatron_ponder.kernels.triton import interleave
from tests.parity.layouts import SP, TIMEOUT_S, TP2, Layout, batch, config_of
from tests.parity.measure import Measured, measure
from tests.parity.tolerances import LOGITS_ABSOLUTE, largest_difference, violations
from tests.ranks import run_ranks

SMALLER = {"global_batch_size": 1, "num_jacobi_iterations": 1}
TRITON = {"kernels": "triton"} | SMALLER
FUSED_LOSS = {"cross_entropy_loss_fusion": True}
MODELS = ["llama k1", "gpt2 k1", "neox k1", "llama k2", "llama pause"]
NUM_STEPS = 1
"""The interpreter runs one program of a kernel after the other."""


@pytest.fixture(scope="module")
def truth(checkpoints):
    return measured(Layout(1, {"kernels": "torch"} | SMALLER), MODELS, checkpoints)[0]


def measured(layout: Layout, models: list[str], folder: str) -> list[dict[str, Measured]]:
    """Every model on one layout, by rank."""
    runs = {m: config_of(m, layout.settings, layout.world_size) for m in models}
    return run_ranks(measure_models, layout.world_size, runs, folder, timeout_s=TIMEOUT_S)


def measure_models(runs: dict, folder: str) -> dict[str, Measured]:
    """Inside a rank."""
    return {
        model: measure(config, f"{folder}/{model}", batch()[:1], NUM_STEPS)
        for model, config in runs.items()
    }


@pytest.mark.parametrize(
    "layout, models",
    [
        (Layout(1, TRITON), ["neox k1", "gpt2 k1"]),
        pytest.param(
            Layout(2, TP2 | SP | TRITON | FUSED_LOSS), ["llama k1"], marks=pytest.mark.slow
        ),
        pytest.param(Layout(1, TRITON | FUSED_LOSS), MODELS, marks=pytest.mark.slow),
        pytest.param(Layout(2, TP2 | TRITON), MODELS, marks=pytest.mark.slow),
    ],
    ids=["alone", "TP2 + SP, fused loss", "alone, fused loss", "TP2"],
)
def test_layout_equals_torch(layout, models, checkpoints, truth):
    for by_model in measured(layout, models, checkpoints):
        for model, numbers in by_model.items():
            assert not violations(numbers, truth[model]), model


def with_a_wrong_slot(config, checkpoint):
    """Thoughts of a kernel that hands on the slot before the one that is asked for."""
    original = interleave.select_slots

    def select(hidden, slots_per_token, stages):
        first = max(stages.start - 1, 0)
        return original(hidden, slots_per_token, range(first, first + len(stages)))

    interleave.select_slots = select
    return measure(config, checkpoint, batch()[:1], 0)


def test_a_wrong_slot_is_caught(checkpoints, truth):
    """By the logits, before any step."""
    config = config_of("neox k1", TRITON, 1)
    (wrong,) = run_ranks(with_a_wrong_slot, 1, config, f"{checkpoints}/neox k1")
    assert largest_difference(wrong.logits, truth["neox k1"].logits) > LOGITS_ABSOLUTE
