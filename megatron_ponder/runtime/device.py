"""The device of this process, and asynchronous copies of numbers from it to the host."""

import os

import torch
from torch import Tensor

from megatron_ponder.errors import BackendError


def device() -> torch.device:
    """This rank's CUDA device if CUDA is available, otherwise the CPU.

    The index counts the devices that this process sees. If a launcher shows each process only its
    own device, the index is 0 for any local rank.

    Raises:
        BackendError: there are several devices, but none can be assigned to this process.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", _device_index(torch.cuda.device_count()))
    return torch.device("cpu")


def _device_index(num_devices: int) -> int:
    """Index of this process's own device among the devices that it sees."""
    if num_devices == 1:
        return 0
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BackendError(
            f"WORLD_SIZE is set and LOCAL_RANK is not, so all processes on this host would use the "
            f"same one of its {num_devices} CUDA devices. Start them with torchrun, or set "
            "LOCAL_RANK to the index of each process on its host (Slurm: SLURM_LOCALID)."
        )
    index = int(local_rank or 0)
    if index >= num_devices:
        raise BackendError(
            f"LOCAL_RANK is {index}, but this process sees {num_devices} CUDA devices only, and "
            f"every rank needs its own. Start at most {num_devices} processes on this host "
            "(--nproc-per-node), or make more devices visible (CUDA_VISIBLE_DEVICES)."
        )
    return index


class HostCopy:
    """An asynchronous copy of numbers from the device to the host; only `fetch` synchronises."""

    def __init__(self, numbers: Tensor) -> None:
        """Start the copy.

        Args:
            numbers: [n]; must not change afterwards.
        """
        self._numbers = numbers
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            # Only a copy to pinned memory is asynchronous.
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def fetch(self) -> list[float]:
        """Wait until the copy is complete, and return the numbers."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()
