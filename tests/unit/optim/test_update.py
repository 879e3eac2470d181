"""Norm, clipping and skipped updates on the device, against megatron-core's own."""

import copy
import itertools
import math

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

from megatron_ponder.optim.update import clipped_update, gradient_norm
from megatron_ponder.parallel.schedule import run_microbatches
from megatron_ponder.ponder.training_plan import training_plan
from megatron_ponder.runtime import distributed
from megatron_ponder.train.step import TrainingState, num_microbatches
from tests.ranks import run_ranks
from tests.unit.checkpoint.small_run import build_training_state, iteration_batches, small_config

pytestmark = pytest.mark.thorough

TIED = {"untie_embeddings_and_output_weights": False}
DISTRIBUTED = {"use_distributed_optimizer": True}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "micro_batch_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, tuple[int, dict[str, object]]] = {
    "fp32": (1, {}),
    "bf16": (1, {"bf16": True}),
    "distributed": (1, DISTRIBUTED),
    "TP2": (2, {**TP2, "qk_layernorm": True}),
    "TP2, tied, bf16": (2, {**TP2, **TIED, "bf16": True}),
    "PP2, tied": (2, {**PP2, **TIED}),
    "DP2, distributed": (2, DISTRIBUTED),
    "DP2, distributed, bf16": (2, {**DISTRIBUTED, "bf16": True}),
    "TP2 DP2, distributed, tied": (4, {**TP2, **DISTRIBUTED, **TIED}),
}
CLIP_GRAD = 0.05
LR = 1e-2


def _with_gradients(world_size: int, settings: dict) -> TrainingState:
    """A model and its gradient, prepared, with the learning rate of a first update."""
    config = small_config(world_size, clip_grad=CLIP_GRAD, lr=LR, **settings)
    training_state = build_training_state(config)
    _compute_gradients(training_state, config, iteration=1)
    return training_state


def _compute_gradients(training_state: TrainingState, config, iteration: int) -> None:
    training_state.model.zero_grad_buffer()
    training_state.optimizer.zero_grad()
    run_microbatches(
        training_state.model,
        iteration_batches(config, iteration),
        plan=training_plan(training_state.model.method, 1),
        num_microbatches=num_microbatches(config),
        micro_batch_size=config.training.micro_batch_size,
        seq_length=config.data.seq_length,
    )
    training_state.optimizer.prepare_grads()


def _norms(world_size: int, settings: dict) -> tuple[float, float]:
    """Ours and megatron-core's."""
    training_state = _with_gradients(world_size, settings)
    norms = gradient_norm(training_state.optimizer).item(), training_state.optimizer.get_grad_norm()
    return norms


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_is_megatron_cores(layout: str) -> None:
    world_size, settings = LAYOUTS[layout]
    norms = run_ranks(_norms, world_size, world_size, settings)
    assert len(set(norms)) == 1, "ranks disagree"
    ours, expected = norms[0]
    assert expected > 2 * CLIP_GRAD
    assert ours == pytest.approx(expected, rel=1e-7)


def _state(training_state: TrainingState) -> list[torch.Tensor]:
    """Weights, masters, moments and counts of steps of this rank."""
    (part,) = training_state.optimizer.chained_optimizers
    state = [value for each in part.optimizer.state.values() for value in each.values()]
    weights = [parameter for _, parameter in training_state.model.named_parameters()]
    return copy.deepcopy([t.detach() for t in (*weights, *part.get_parameters(), *state)])


def _largest_difference(first: list[torch.Tensor], second: list[torch.Tensor]) -> float:
    pairs = zip(first, second, strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def _updates(
    world_size: int, settings: dict, clip_grads: tuple[float, ...]
) -> list[dict[str, float]]:
    """`_update` for each of some limits, in one start of ranks."""
    return [_update(world_size, settings, clip_grad) for clip_grad in clip_grads]


def _update(world_size: int, settings: dict, clip_grad: float) -> dict[str, float]:
    """Two updates by megatron-core's three calls, and by ours: how far apart they end."""
    config = small_config(world_size, clip_grad=clip_grad, lr=LR, **settings)
    ends = []
    for is_ours in (True, False):
        training_state = build_training_state(config)
        optimizer = training_state.optimizer
        start = _state(training_state)
        for iteration in (1, 2):
            _compute_gradients(training_state, config, iteration)
            norm = gradient_norm(optimizer)
            if is_ours:
                clipped_update(optimizer, norm, torch.tensor(True))
            else:
                for part in optimizer.chained_optimizers:
                    clip_grad_by_total_norm_fp32(
                        part.get_parameters(), part.config.clip_grad, norm.item()
                    )
                optimizer.step_with_ready_grads()
        ends.append(_state(training_state))
    moved = _largest_difference(start, ends[0][: len(start)])
    return {"moved": moved, "apart": _largest_difference(*ends)}


@pytest.mark.parametrize("layout", ["fp32", "bf16", "DP2, distributed", "TP2, tied, bf16"])
def test_update_is_megatron_cores(layout: str) -> None:
    """To the bit where nothing is clipped; else within the rounding of a division."""
    world_size, settings = LAYOUTS[layout]
    limits = {0.0: 0.0, 1e3: 0.0, CLIP_GRAD: 1e-6}
    for by_limit in run_ranks(_updates, world_size, world_size, settings, tuple(limits)):
        for (clip_grad, allowed), found in zip(limits.items(), by_limit, strict=True):
            assert found["moved"] >= LR / 2
            # A bf16 weight may be rounded the other way.
            bound = 2**-8 if allowed and settings.get("bf16") else allowed
            assert found["apart"] <= bound, (clip_grad, found)


def _skips(world_size: int, settings: dict) -> list[dict[str, object]]:
    """`_skip` for each kind of number that is not finite, in one start of ranks."""
    return [_skip(world_size, settings, poison) for poison in (math.nan, math.inf)]


def _skip(world_size: int, settings: dict, poison: float) -> dict[str, object]:
    """An update, a skipped one with a gradient that is not finite on one rank, and another."""
    training_state = _with_gradients(world_size, settings)
    optimizer = training_state.optimizer
    clipped_update(optimizer, gradient_norm(optimizer), torch.tensor(True))
    before = _state(training_state)
    inner = optimizer.chained_optimizers[0].optimizer
    parameter = inner.param_groups[0]["params"][0]
    kept = parameter.grad.clone()
    if distributed.ranks().rank == 0:
        parameter.grad.view(-1)[0] = poison
    norm = gradient_norm(optimizer)
    clipped_update(optimizer, norm, torch.isfinite(norm))
    skipped = _largest_difference(before, _state(training_state))
    parameter.grad.copy_(kept)
    for group in inner.param_groups:
        for each in group["params"]:
            each.grad.nan_to_num_(0.0, 0.0, 0.0)
    norm_after = gradient_norm(optimizer)
    clipped_update(optimizer, norm_after, torch.isfinite(norm_after))
    after = _largest_difference(before, _state(training_state))
    return {"norm": norm.item(), "skipped": skipped, "after": after, "steps": _steps(inner)}


def _steps(inner: torch.optim.Optimizer) -> set[float]:
    return {state["step"].item() for state in inner.state.values()}


@pytest.mark.parametrize("layout", ["fp32", "bf16", "distributed", "TP2", "DP2, distributed"])
def test_nothing_moves_where_the_gradient_is_not_finite(layout: str) -> None:
    """On any rank; and the next update is the second, not the third."""
    world_size, settings = LAYOUTS[layout]
    for found in itertools.chain(*run_ranks(_skips, world_size, world_size, settings)):
        assert not math.isfinite(found["norm"])
        assert found["skipped"] == 0.0
        assert found["after"] > 0.0 and found["steps"] == {2.0}


def _without_scale() -> tuple[float, float, float]:
    """torch's SGD stands for an optimizer that takes neither a scale nor a reason to skip."""
    training_state = _with_gradients(1, {})
    optimizer = get_megatron_optimizer(
        OptimizerConfig(optimizer="sgd", lr=1.0, clip_grad=CLIP_GRAD, weight_decay=0.0),
        training_state.model.chunks,
    )
    optimizer.prepare_grads()
    start = _state(training_state)
    norm = gradient_norm(optimizer)
    clipped_update(optimizer, norm, torch.tensor(False))
    skipped = _largest_difference(start, _state(training_state))
    clipped_update(optimizer, norm, torch.tensor(True))
    moved = [a - b for a, b in zip(start, _state(training_state), strict=True)]
    num_weights = len(list(training_state.model.named_parameters()))
    length = torch.cat([m.flatten() for m in moved[:num_weights]]).norm().item()
    return norm.item(), skipped, length


def test_other_optimizers_are_clipped_by_the_host() -> None:
    norm, skipped, length = run_ranks(_without_scale, 1)[0]
    assert norm > 2 * CLIP_GRAD and skipped == 0.0
    assert length == pytest.approx(CLIP_GRAD, rel=1e-3)
