"""Which stages of an interleaved sequence somebody reads, in the form in which layers are told."""

import torch
from torch import Tensor

from megatron_ponder.ponder.interleave import select_slots
from megatron_ponder.ponder.plan import Pass


def kept_slots(pass_: Pass) -> Tensor | None:
    """Stages, first and end of those read, int64 [3] on the CPU; None where all are read."""
    read = pass_.output_slots
    if pass_.outputs_per_token == pass_.slots_per_token:
        return None
    return torch.tensor((pass_.slots_per_token, read.start, read.stop), device="cpu")


def keep_slots(hidden: Tensor, kept: Tensor | None) -> Tensor:
    """[s * stages, b, h] -> [s * kept stages, b, h]; all of it where `kept` is None."""
    if kept is None:
        return hidden
    return select_slots(hidden, *slots_of(kept))


def slots_of(kept: Tensor) -> tuple[int, range]:
    """Slots per token, and which of them are read."""
    slots_per_token, first, end = kept.tolist()
    return slots_per_token, range(first, end)
