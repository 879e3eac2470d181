"""Predicted bytes against those that a training step sends."""

from typing import Any

import pytest

from megatron_ponder.config.schema import RunConfig
from megatron_ponder.planning.communication import stage_traffic
from megatron_ponder.planning.report import largest_plan, microbatches_per_step
from tests.ranks import run_ranks
from tests.unit.planning.measured_traffic import measure_traffic
from tests.unit.planning.runs import QWEN3, small_run

TOLERANCE = 0.005
"""Sums of norms and losses over ranks are not predicted."""
LAYOUTS: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2 + SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2, "global_batch_size": 4},
    "PP2, 2 layer chunks, 2 passes with gradient": {
        "pipeline_model_parallel_size": 2,
        "global_batch_size": 4,
        "num_virtual_stages_per_pipeline_rank": 2,
        "jacobi_grad_passes": 2,
    },
    "DP2": {},
    "DP2 + distributed optimizer": {"use_distributed_optimizer": True},
}


@pytest.mark.parametrize(
    ("architecture", "method"),
    [
        *(("llama", "K1"), ("gpt2", "K2"), ("llama", "ponderlm"), ("llama", "accumulating")),
        *(("gpt2", "ponderlm"), ("gpt_neox", "loop"), ("llama", "pause")),
    ],
)
def test_two_ranks(architecture: str, method: str) -> None:
    """Not context parallelism: torch's causal bias does not work while operations are watched."""
    configs = [small_run(architecture, method, world_size=2, **more) for more in LAYOUTS.values()]
    by_rank = run_ranks(_measure_all, 2, configs)
    for config, layout, *sent in zip(configs, LAYOUTS, *by_rank, strict=True):
        stages = stage_traffic(config, largest_plan(config), 2, microbatches_per_step(config, 2))
        ranks_per_stage = 2 // len(stages)
        for rank, found in enumerate(sent):
            predicted = sum(vars(stages[rank // ranks_per_stage]).values())
            assert predicted > 0
            assert sum(found.values()) == pytest.approx(predicted, rel=TOLERANCE), (layout, found)


def test_norms_of_heads() -> None:
    """Their gradients are added up over tensor-parallel ranks, with sequence shards or without."""
    for name in ("TP2", "TP2 + SP"):
        config = small_run("llama", "K1", world_size=2, **QWEN3 | LAYOUTS[name])
        found, _ = run_ranks(_measure_all, 2, [config])
        (stage,) = stage_traffic(config, largest_plan(config), 2, microbatches_per_step(config, 2))
        assert sum(found[0].values()) == pytest.approx(sum(vars(stage).values()), rel=TOLERANCE)


def _measure_all(configs: list[RunConfig]) -> list[dict[str, float]]:
    return [measure_traffic(config) for config in configs]
