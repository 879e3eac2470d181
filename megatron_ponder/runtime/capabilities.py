"""What this machine has of the libraries that exist on GPU clusters only."""

import importlib.util

import torch


def has_transformer_engine() -> bool:
    """Whether TransformerEngine is installed and could run: it needs a CUDA device."""
    return torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None
