"""What the entry point does before torch is there."""

import os

import pytest

from megatron_ponder.config.schema import RunConfig
from megatron_ponder.pretrain import _set_environment

NAME = "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.mark.parametrize(
    ("size", "before", "after"), [(1, None, None), (2, None, "1"), (2, "8", "8")]
)
def test_one_queue_for_tensor_parallelism(size, before, after, monkeypatch):
    monkeypatch.delenv(NAME, raising=False)
    if before is not None:
        monkeypatch.setenv(NAME, before)
    # Set by this, so that monkeypatch restores what was there.
    monkeypatch.setattr(os, "environ", dict(os.environ))
    _set_environment(RunConfig().replaced(tensor_model_parallel_size=size))
    assert os.environ.get(NAME) == after
