"""Weight gradients added up within their product are the same gradients.

On CPU by torch in the place of apex's module. Tied weights and mixtures use a weight both ways.
"""

import pytest

from tests.parity.layouts import (
    NUM_STEPS,
    PP2,
    SP,
    TP2,
    Layout,
    batch,
    config_of,
    measure_layout,
)
from tests.parity.measure import measure
from tests.parity.test_layouts import assert_equal
from tests.parity.tolerances import violations
from tests.ranks import run_ranks

FUSED = {"gradient_accumulation_fusion": True}
FUSED_LOSS = {"cross_entropy_loss_fusion": True}
LAYOUTS = {
    "alone": (Layout(1, FUSED), ["llama k2", "gpt2 k1", "gpt2 mixtures of 5", "neox loop"]),
    "alone, fused loss": (Layout(1, FUSED | FUSED_LOSS), ["gpt2 ponderlm", "llama mixtures"]),
    "alone, recomputed": (Layout(1, FUSED | {"recompute_granularity": "pass"}), ["llama k2"]),
    "TP2 + SP": (Layout(2, TP2 | SP | FUSED), ["neox k1"]),
    "PP2": (Layout(2, PP2 | FUSED | FUSED_LOSS), ["gpt2 ponderlm"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_composed_gradients(name, checkpoints, single_process):
    layout, models = LAYOUTS[name]
    assert_equal(measure_layout(layout, models, checkpoints), single_process, name)


def without_the_mark(config, checkpoint):
    """A model that does not say that a weight is used both ways."""
    from megatron_ponder.model.ponder_gpt_model import PonderGPTModel

    PonderGPTModel._use_weights_fused_and_unfused = lambda self: None
    return measure(config, checkpoint, batch(), NUM_STEPS)


def test_a_lost_part_is_caught(checkpoints, single_process):
    config = config_of("llama mixtures", FUSED | FUSED_LOSS, 1)
    (wrong,) = run_ranks(without_the_mark, 1, config, f"{checkpoints}/llama mixtures")
    assert any("output_layer" in v for v in violations(wrong, single_process["llama mixtures"]))
