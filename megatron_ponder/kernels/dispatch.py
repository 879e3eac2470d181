"""Select the kernel implementation of this process: plain torch or Triton.

One setting covers all kernels (`--kernels`). `runtime.backends` sets it once, when a model is
built. Each function in this package that has two implementations checks `uses_triton()` when it
is called, so callers see one interface. `runtime.capabilities` checks whether Triton can run here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Kernels = Literal["torch", "triton"]

_chosen: Kernels = "torch"


def choose_kernels(kernels: Kernels) -> None:
    """Select the implementation for all later calls."""
    global _chosen
    _chosen = kernels


def uses_triton() -> bool:
    """Whether the Triton kernels are selected."""
    return _chosen == "triton"


@contextmanager
def kernels_chosen(kernels: Kernels) -> Iterator[None]:
    """Select the implementation inside the context, and restore the previous one at its end."""
    before = _chosen
    choose_kernels(kernels)
    try:
        yield
    finally:
        choose_kernels(before)
