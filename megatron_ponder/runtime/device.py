"""The device of this process."""

import os

import torch


def device() -> torch.device:
    """This rank's CUDA device where CUDA is present, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")
