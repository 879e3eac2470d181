"""The golden cases, a bf16 run and a step's waits on a GPU.

Their CPU twins are tests/golden, tests/e2e and tests/unit/train.

Not run yet on any GPU: none was available while this was written.
"""

import pytest
import torch

from megatron_ponder.train.step import train_step
from tests.golden.cases import NAMES
from tests.golden.test_golden import violations_of_all, write_checkpoints
from tests.parity.layouts import config_of
from tests.parity.test_bf16 import BF16_MODELS, losses_in_bf16
from tests.ranks import run_ranks
from tests.unit.checkpoint.small_run import build_training_state, iteration_batches, small_config
from tests.unit.train.test_synchronizations import METHODS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]


def test_golden_cases_in_fp32(tmp_path):
    """The authors' numbers, on megatron-core without any patch."""
    for name in NAMES:
        (tmp_path / name).mkdir()
    run_ranks(write_checkpoints, 1, str(tmp_path))
    (found,) = run_ranks(violations_of_all, 1, str(tmp_path), {})
    assert not any(found.values()), found


@pytest.mark.parametrize("model", BF16_MODELS)
def test_bf16_learns_one_batch(model):
    """Twenty steps on one batch bring its loss down."""
    (losses,) = run_ranks(losses_in_bf16, 1, config_of(model, {"bf16": True}, 1))
    assert all(torch.isfinite(torch.tensor(losses)))
    assert losses[-1] < losses[0] - 0.5


def _steps_that_may_not_wait(settings):
    """Two steps, and two in which torch refuses to wait for the device; the last one's loss."""
    config = small_config(1, **{**settings, "random_jacobi_iterations": False})
    training_state = build_training_state(config)
    for iteration in range(1, 5):
        batches = [
            {key: tensor.pin_memory() for key, tensor in batch.items()}
            for batch in iteration_batches(config, iteration)
        ]
        torch.cuda.set_sync_debug_mode("error" if iteration > 2 else "default")
        step = train_step(
            config, training_state, iter(batches), iteration=iteration, wants_stop=False
        )
    torch.cuda.set_sync_debug_mode("default")
    loss = step.fetch().loss
    return loss


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_does_not_wait_for_the_device(method, precision):
    (loss,) = run_ranks(_steps_that_may_not_wait, 1, METHODS[method] | precision)
    assert 0 < loss < 10
