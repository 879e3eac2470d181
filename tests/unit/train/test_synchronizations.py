"""A training step asks the device for nothing: every method, and what reads its numbers.

Left out: context parallelism, whose attention torch cannot run while operations are watched.
"""

import pytest
import torch

from megatron_ponder.model.embedding import rounded_scale
from megatron_ponder.train.step import train_step
from tests.ranks import run_ranks
from tests.unit.checkpoint.small_run import build_training_state, iteration_batches, small_config
from tests.unit.train.synchronizations import synchronizations

pytestmark = pytest.mark.thorough

FIXED_R = {"random_jacobi_iterations": False}
METHODS: dict[str, dict[str, object]] = {
    "vanilla": {"method": "vanilla", **FIXED_R},
    "ponderlm2 with random R": {"num_latent_thoughts": 2, "hidden_dropout": 0.1},
    "ponderlm2 with mixtures": {"interpolation": True, "jacobi_grad_passes": 2},
    "ponderlm of top 5": {
        "method": "ponderlm",
        "interpolation_use_topk": True,
        "interpolation_topk": 5,
        **FIXED_R,
    },
    "loop, recomputed": {"method": "loop", "recompute_granularity": "pass", **FIXED_R},
    "pause": {"method": "pause", "pause_token_id": 60, **FIXED_R},
}
OPTIMIZERS: dict[str, dict[str, object]] = {
    "fp32": {},
    "bf16": {"bf16": True},
    "distributed": {"use_distributed_optimizer": True, "overlap_grad_reduce": True},
    "distributed bf16": {"use_distributed_optimizer": True, "bf16": True},
}
NUM_STEPS = 3


def _waits(settings: dict, world_size: int) -> tuple[list[str], list[str]]:
    """In a rank: what some steps wait for, and what reading the last one's numbers does."""
    config = small_config(world_size, **settings)
    training_state = build_training_state(config)
    batches = [iteration_batches(config, iteration) for iteration in range(NUM_STEPS + 1)]
    with synchronizations() as in_steps:
        for iteration in range(1, NUM_STEPS + 1):
            step = train_step(
                config, training_state, batches[iteration], iteration=iteration, wants_stop=True
            )
    with synchronizations() as in_reading:
        assert step.fetch().is_updated
    return in_steps, in_reading


@pytest.mark.parametrize("fuses", [False, True], ids=["composed loss", "fused loss"])
@pytest.mark.parametrize("method", METHODS)
def test_no_method_waits(method: str, fuses: bool) -> None:
    in_steps, in_reading = run_ranks(
        _waits, 1, {**METHODS[method], "cross_entropy_loss_fusion": fuses}, 1
    )[0]
    assert not in_steps, "\n".join(sorted(set(in_steps)))
    assert in_reading, "the numbers were read without asking for them"


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_optimizer_waits(optimizer: str) -> None:
    in_steps, _ = run_ranks(_waits, 1, OPTIMIZERS[optimizer], 1)[0]
    assert not in_steps, "\n".join(sorted(set(in_steps)))


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2},
        {"use_distributed_optimizer": True},
    ],
    ids=["tensor", "pipeline", "data"],
)
def test_no_layout_waits(layout: dict) -> None:
    for in_steps, _ in run_ranks(_waits, 2, layout, 2):
        assert not in_steps, "\n".join(sorted(set(in_steps)))


@pytest.mark.parametrize(
    "wait",
    [
        lambda t: t.sum().item(),
        lambda t: bool(t.any()),
        lambda t: t.tolist(),
        lambda t: t[t > 0],
        lambda t: torch.equal(t, t),
        lambda t: t.new_tensor([1]),
        lambda t: t.cpu(),
    ],
    ids=["item", "bool", "tolist", "mask", "equal", "new_tensor", "cpu"],
)
def test_a_wait_is_found(wait) -> None:
    tensor = torch.ones(3)
    with synchronizations() as found:
        wait(tensor)
    assert len(found) == 1 and "test_synchronizations.py" in found[0]


def test_what_stays_on_the_cpu_on_purpose_is_left_out() -> None:
    with synchronizations() as found:
        rounded_scale(1.5, torch.bfloat16)
    assert not found
