"""Predicted bytes against those that a training step sends."""

from typing import Any

import pytest

from megatron_ponder.planning.communication import stage_traffic
from megatron_ponder.planning.report import largest_plan, microbatches_per_step
from megatron_ponder.ponder.method import load_method
from tests.ranks import run_ranks
from tests.unit.planning.measured_traffic import measure_traffic
from tests.unit.planning.runs import small_run

TOLERANCE = 0.005
"""Sums of norms and losses over ranks are not predicted."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2 + SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "DP2": {},
    "DP2 + distributed optimizer": {"use_distributed_optimizer": True},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("architecture", "method"), [("llama", "K1"), ("gpt2", "K2")])
def test_two_ranks(layout: str, architecture: str, method: str) -> None:
    config = small_run(architecture, method, world_size=2, **LAYOUTS[layout])
    sent = run_ranks(measure_traffic, 2, config)
    plan = largest_plan(config, load_method(config.method))
    stages = stage_traffic(config, plan, 2, microbatches_per_step(config, 2))
    ranks_per_stage = 2 // len(stages)
    for rank, found in enumerate(sent):
        predicted = sum(vars(stages[rank // ranks_per_stage]).values())
        assert predicted > 0
        assert sum(found.values()) == pytest.approx(predicted, rel=TOLERANCE), found
