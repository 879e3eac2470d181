"""The device of this process, and how numbers come back from it."""

import os

import torch
from torch import Tensor

from megatron_ponder.errors import BackendError


def device() -> torch.device:
    """This rank's CUDA device where CUDA is present, else the CPU.

    The device is numbered as this process sees them: where a launcher shows each process its own
    device only, that is number 0, whatever the local rank.

    Raises:
        BackendError: there are several devices, and none for this process.
    """
    if torch.cuda.is_available():
        return torch.device("cuda", _device_index(torch.cuda.device_count()))
    return torch.device("cpu")


def _device_index(num_devices: int) -> int:
    """Which of the devices that this process sees is its own."""
    if num_devices == 1:
        return 0
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise BackendError(
            f"WORLD_SIZE is set and LOCAL_RANK is not, so that all processes of this host would "
            f"take the same of its {num_devices} CUDA devices. Start them with torchrun, or set "
            "LOCAL_RANK to each process's number on its host (Slurm: SLURM_LOCALID)."
        )
    index = int(local_rank or 0)
    if index >= num_devices:
        raise BackendError(
            f"LOCAL_RANK is {index}, but this process sees {num_devices} CUDA devices only, and "
            f"every rank needs one of its own. Start at most {num_devices} processes on this host "
            "(--nproc-per-node), or show it more devices (CUDA_VISIBLE_DEVICES)."
        )
    return index


class HostCopy:
    """Numbers on their way from the device to the host, which waits for them only to read them."""

    def __init__(self, numbers: Tensor) -> None:
        """Start.

        Args:
            numbers: [n]; not changed afterwards.
        """
        self._numbers = numbers
        self._arrived: torch.cuda.Event | None = None
        if numbers.is_cuda:
            # Only a copy to pinned memory runs by itself.
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def fetch(self) -> list[float]:
        """The numbers, as soon as they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()
