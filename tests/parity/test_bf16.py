"""bf16 with fp32 masters: it learns, and a layout stays within bf16's rounding of one process."""

import pytest
import torch

from megatron_ponder.optim.adamw import build_optimizer
from megatron_ponder.parallel.parallel_model import build_parallel_model
from megatron_ponder.runtime import distributed
from tests.parity.layouts import batch, config_of
from tests.parity.measure import run_step, update
from tests.parity.tolerances import BF16_LOSS_ABSOLUTE
from tests.ranks import run_ranks

BF16_MODELS = ["llama k2", "neox k1", "gpt2 k2"]
BF16 = {"bf16": True}
TP2_SP_DIST_OPT = BF16 | {
    "micro_batch_size": 2,
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "use_distributed_optimizer": True,
}
NUM_STEPS = 20


def losses_in_bf16(config):
    """The loss of each of NUM_STEPS steps on one batch (inside a rank)."""
    distributed.initialize(config.parallel, config.training.seed)
    model = build_parallel_model(config)
    optimizer, scheduler = build_optimizer(config, model.chunks)
    parameters = [parameter for _, parameter in model.named_parameters()]
    assert {p.dtype for p in parameters} == {torch.bfloat16}
    assert all(p.main_grad.dtype == torch.float32 for p in parameters)
    plan = model.method.plan(config.method.num_jacobi_iterations)
    losses = []
    for _ in range(NUM_STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        losses.append(run_step(model, config, batch(), plan))
        update(optimizer)
        scheduler.step(increment=1)
    return losses


@pytest.mark.parametrize(
    "model",
    [BF16_MODELS[0], *(pytest.param(m, marks=pytest.mark.slow) for m in BF16_MODELS[1:])],
)
def test_learns_and_layouts_agree(model):
    """Twenty steps on one batch bring its loss down, alike on one process and on TP2 x DP2."""
    (alone,) = run_ranks(losses_in_bf16, 1, config_of(model, BF16 | {"micro_batch_size": 4}, 1))
    assert alone[-1] < alone[0] - 1
    for losses in run_ranks(losses_in_bf16, 4, config_of(model, TP2_SP_DIST_OPT, 4)):
        assert losses == pytest.approx(alone, abs=BF16_LOSS_ABSOLUTE)
