"""Finds where code waits for the device, on a machine where device and host are one.

A wait is asking a tensor for a number, or for a result whose shape depends on numbers; and a copy
from a Python list, which passes through pageable memory. The dispatcher sees the first two wherever
they are done, but not `tolist` and its kind, for which the methods themselves are watched.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING_OPERATIONS = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
WAITING_METHODS = ("tolist", "numpy", "cpu", "__array__", "new_tensor")
ON_THE_CPU_ON_PURPOSE = {
    ("random.py", "fork"),  # megatron-core compares states of the CPU's generator
    ("embedding.py", "rounded_scale"),  # rounds a number with a tensor of its own on the CPU
}


def _selects_by_mask(name: str, args: tuple) -> bool:
    """Indexing with a mask; setting one number there is done without counting."""
    if name == "index" or name.startswith("index_put") and args[2].numel() > 1:
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return False


@contextmanager
def synchronizations() -> Iterator[list[str]]:
    """Inside, every wait adds `operation: where` to the list, but those on the CPU on purpose."""
    found: list[str] = []

    def note(operation: str) -> None:
        frames = [f for f in traceback.extract_stack()[:-2] if "/torch/" not in f.filename]
        where = [(frame.filename.rpartition("/")[2], frame.name) for frame in frames[-4:]]
        if not ON_THE_CPU_ON_PURPOSE.intersection(where):
            chain = " < ".join(f"{frame.filename}:{frame.lineno}" for frame in frames[:-5:-1])
            found.append(f"{operation}: {chain}")

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            name = func.overloadpacket.__name__
            if name in WAITING_OPERATIONS or _selects_by_mask(name, args):
                note(name)
            return func(*args, **(kwargs or {}))

    def watched(name: str) -> Any:
        method = getattr(torch.Tensor, name)

        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            note(name)
            return method(tensor, *args, **kwargs)

        return call

    with mock.patch.multiple(torch.Tensor, **{name: watched(name) for name in WAITING_METHODS}):
        with Watch():
            yield found
