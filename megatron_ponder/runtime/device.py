"""The device of this process, and how numbers come back from it."""

import os

import torch
from torch import Tensor


def device() -> torch.device:
    """This rank's CUDA device where CUDA is present, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


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

    def read(self) -> list[float]:
        """The numbers, as soon as they are there."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._numbers.tolist()
