"""Predicted bytes against those that a training step sends."""

from typing import Any

import pytest

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.planning.communication import stage_traffic
from tests.ranks import run_ranks
from tests.unit.planning.measured_traffic import measure_traffic
from tests.unit.planning.runs import QWEN3, small_run

pytestmark = pytest.mark.thorough

TOLERANCE = 0.005
"""Sums of norms and losses over ranks are not predicted."""
MODEL_PARALLEL: dict[str, dict[str, Any]] = {
    "TP2": {"tensor_model_parallel_size": 2},
    "TP2 + SP": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "PP2": {"pipeline_model_parallel_size": 2, "global_batch_size": 4},
    "PP2, 2 layer chunks, 2 passes with gradient": {
        "pipeline_model_parallel_size": 2,
        "global_batch_size": 4,
        "num_virtual_stages_per_pipeline_rank": 2,
        "jacobi_grad_passes": 2,
    },
}
DATA_PARALLEL: dict[str, dict[str, Any]] = {
    "DP2": {},
    "DP2 + distributed optimizer": {"use_distributed_optimizer": True},
}
"""What these send depends on the architecture, not on the method."""


@pytest.mark.parametrize(
    ("architecture", "method", "layouts"),
    [
        ("llama", "K1", MODEL_PARALLEL | DATA_PARALLEL),
        ("gpt2", "K2", MODEL_PARALLEL | DATA_PARALLEL),
        ("gpt_neox", "loop", MODEL_PARALLEL | DATA_PARALLEL),
        ("llama", "ponderlm", MODEL_PARALLEL),
        ("llama", "accumulating", MODEL_PARALLEL),
        ("gpt2", "ponderlm", MODEL_PARALLEL),
        ("llama", "pause", MODEL_PARALLEL),
    ],
)
def test_two_ranks(architecture: str, method: str, layouts: dict[str, dict[str, Any]]) -> None:
    """Not context parallelism: torch's causal bias does not work while operations are watched."""
    check(architecture, method, layouts)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "method"),
    [("llama", "ponderlm"), ("llama", "accumulating"), ("gpt2", "ponderlm"), ("llama", "pause")],
)
def test_two_replicas_of_other_methods(architecture: str, method: str) -> None:
    check(architecture, method, DATA_PARALLEL)


def test_norms_of_heads() -> None:
    """Their gradients are added up over tensor-parallel ranks, with sequence shards or without."""
    layouts = {name: QWEN3 | MODEL_PARALLEL[name] for name in ("TP2", "TP2 + SP")}
    check("llama", "K1", layouts)


def check(architecture: str, method: str, layouts: dict[str, dict[str, Any]]) -> None:
    runs = [small_run(architecture, method, world_size=2, **more) for more in layouts.values()]
    by_rank = run_ranks(_measure_all, 2, [run.config for run in runs])
    for run, layout, *sent in zip(runs, layouts, *by_rank, strict=True):
        stages = stage_traffic(run)
        ranks_per_stage = 2 // len(stages)
        for rank, found in enumerate(sent):
            predicted = sum(vars(stages[rank // ranks_per_stage]).values())
            assert predicted > 0
            assert sum(found.values()) == pytest.approx(predicted, rel=TOLERANCE), (layout, found)


def _measure_all(configs: list[ResolvedConfig]) -> list[dict[str, float]]:
    return [measure_traffic(config) for config in configs]
