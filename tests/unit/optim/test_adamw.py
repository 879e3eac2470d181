"""The optimizer against torch's own AdamW, and the schedule against its formulas."""

import math

import pytest
import torch

from megatron_ponder.checkpoint.progress import Progress
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.optim.adamw import build_scheduler, learning_rate
from megatron_ponder.train.step import train_step
from tests.ranks import run_ranks
from tests.unit.checkpoint.small_run import (
    build_training_state,
    iteration_batches,
    run_iterations,
    small_config,
)

NUM_STEPS = 4
WEIGHT_DECAY = 0.5


class _OneGroup:
    """Stands where the scheduler wants an optimizer: it only reads and sets parameter groups."""

    def __init__(self, config: RunConfig) -> None:
        self.param_groups = [{"lr": 0.0, "max_lr": config.optimizer.lr, "wd_mult": 1.0}]


def _rates(**changes: object) -> list[float]:
    """The learning rate of iterations 1..20."""
    config = small_config(train_iters=20, lr=1.0, min_lr=0.1, **changes)
    optimizer = _OneGroup(config)
    optimizer.param_groups[0]["min_lr"] = 0.1
    scheduler = build_scheduler(config, optimizer)
    rates = []
    for _ in range(20):
        rates.append(learning_rate(optimizer))
        scheduler.step(1)
    return rates


def test_warm_up_is_linear_from_zero() -> None:
    assert _rates(lr_warmup_iters=4)[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])


def test_warm_up_as_a_fraction() -> None:
    assert _rates(lr_warmup_iters=None, lr_warmup_fraction=0.2) == _rates(lr_warmup_iters=4)


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("cosine", lambda i: 0.1 + 0.9 * (1 + math.cos(math.pi * i / 20)) / 2),
        ("linear", lambda i: 0.1 + 0.9 * (1 - i / 20)),
        ("constant", lambda i: 1.0),
        ("inverse-square-root", lambda i: max(0.1, 1 / math.sqrt(max(i, 1)))),
        ("WSD", lambda i: 0.1 + 0.9 * (1.0 if i <= 15 else 2 * 0.5 ** ((i - 15) / 5) - 1)),
    ],
)
def test_decay(style: str, expected) -> None:
    rates = _rates(lr_warmup_iters=0, lr_decay_style=style, lr_wsd_decay_iters=5)
    assert rates == pytest.approx([expected(i) for i in range(20)])


def _step_beside_torch(settings: dict) -> dict[str, float]:
    """Largest difference of each weight from torch's AdamW on the same gradients, after steps."""
    config = small_config(1, weight_decay=WEIGHT_DECAY, **settings)
    training_state = build_training_state(config)
    model = training_state.model.modules[0]
    named = dict(model.named_parameters())
    copies = {name: p.detach().clone().float().requires_grad_() for name, p in named.items()}
    decayed = [c for c in copies.values() if c.dim() > 1]
    others = [c for c in copies.values() if c.dim() == 1]
    reference = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": WEIGHT_DECAY},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=1.0,
        betas=(config.optimizer.adam_beta1, config.optimizer.adam_beta2),
        eps=config.optimizer.adam_eps,
    )
    for iteration in range(1, NUM_STEPS + 1):
        batches = iteration_batches(config, iteration)
        step = train_step(
            config, training_state, batches, iteration=iteration, wants_stop=False
        ).fetch()
        for name, parameter in named.items():
            copies[name].grad = parameter.main_grad.clone().float()
        for group in reference.param_groups:
            group["lr"] = step.learning_rate
        reference.step()
    differences = {
        name: (named[name].float() - copy.to(named[name].dtype).float()).abs().max().item()
        for name, copy in copies.items()
    }
    return differences


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_distributed_optimizer": True}, {"bf16": True}],
    ids=["fp32", "distributed", "bf16"],
)
def test_updates_are_torch_adamw(settings: dict) -> None:
    """With decay on matrices only; the gradient buffer holds what clipping left."""
    differences = run_ranks(_step_beside_torch, 1, settings)[0]
    assert len(differences) > 10
    last_bit_of_a_weight_near_one = 1.2e-7
    allowed = 1e-2 if settings.get("bf16") else last_bit_of_a_weight_near_one
    assert max(differences.values()) <= allowed, differences


def _norms(clip_grad: float) -> list[float]:
    """Gradient norms of some steps."""
    config = small_config(1, clip_grad=clip_grad)
    training_state = build_training_state(config)
    norms = [
        step.grad_norm for step in run_iterations(config, training_state, Progress(), NUM_STEPS)
    ]
    clipped = math.sqrt(
        sum(p.main_grad.square().sum().item() for p in training_state.model.modules[0].parameters())
    )
    return [*norms, clipped]


def test_clipping_scales_the_gradient_and_zero_means_none() -> None:
    *norms, last = run_ranks(_norms, 1, 0.01)[0]
    assert min(norms) > 0.1 and last == pytest.approx(0.01, rel=1e-3)
    *norms, last = run_ranks(_norms, 1, 0.0)[0]
    assert last == pytest.approx(norms[-1], rel=1e-5)
