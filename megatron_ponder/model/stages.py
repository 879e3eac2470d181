"""Which stages of an interleaved sequence somebody reads, in the form in which layers are told."""

import torch
from torch import Tensor

from megatron_ponder.ponder.interleave import select_stages
from megatron_ponder.ponder.plan import Pass


def kept_stages(pass_: Pass) -> Tensor | None:
    """Stages, first and end of those read, int64 [3] on the CPU; None where all are read."""
    read = pass_.read_stages
    if pass_.num_read_stages == pass_.num_stages:
        return None
    return torch.tensor((pass_.num_stages, read.start, read.stop), device="cpu")


def keep_stages(hidden: Tensor, kept: Tensor | None) -> Tensor:
    """[s * stages, b, h] -> [s * kept stages, b, h]; all of it where `kept` is None."""
    if kept is None:
        return hidden
    return select_stages(hidden, *stages_of(kept))


def stages_of(kept: Tensor) -> tuple[int, range]:
    """Slots per token, and which of them are read."""
    num_stages, first, end = kept.tolist()
    return num_stages, range(first, end)
