"""Which device a process takes, from what its launcher says and what it sees."""

import pytest
import torch

from megatron_ponder.errors import BackendError
from megatron_ponder.runtime.device import device


@pytest.fixture
def machine(monkeypatch):
    """Devices that this process sees, and what its launcher set."""

    def set_up(num_devices: int, **environment: str) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: num_devices > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: num_devices)
        for name in ("LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return set_up


@pytest.mark.parametrize(
    ("num_devices", "environment", "expected"),
    [
        (0, {"LOCAL_RANK": "3"}, "cpu"),
        (8, {}, "cuda:0"),
        (8, {"LOCAL_RANK": "3", "WORLD_SIZE": "8"}, "cuda:3"),
        # Slurm's --gpus-per-task: each process sees one device, its own.
        (1, {"LOCAL_RANK": "3", "WORLD_SIZE": "8"}, "cuda:0"),
    ],
)
def test_device(num_devices, environment, expected, machine):
    machine(num_devices, **environment)
    assert device() == torch.device(expected)


def test_more_processes_than_devices(machine):
    machine(2, LOCAL_RANK="2", WORLD_SIZE="4")
    with pytest.raises(BackendError, match="sees 2 CUDA devices only.*--nproc-per-node"):
        device()


def test_no_local_rank(machine):
    machine(8, WORLD_SIZE="4")
    with pytest.raises(BackendError, match="LOCAL_RANK is not.*SLURM_LOCALID"):
        device()
