"""The golden cases and a bf16 run on a GPU. Their CPU twins are tests/golden and tests/e2e.

Not run yet on any GPU: none was available while this was written.
"""

import pytest
import torch

from tests.golden.cases import NAMES
from tests.golden.test_golden import violations_of_all, write_checkpoints
from tests.parity.layouts import config_of
from tests.parity.test_bf16 import BF16_MODELS, losses_in_bf16
from tests.ranks import run_ranks

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
