"""Which implementation of the kernels this process runs: plain torch, or Triton.

One setting for all of them (`--kernels`), chosen once when a model is built
(`runtime.backends`). Each function in this package that has two implementations asks
`uses_triton()` where it is called, so that both give the same interface. Left out: whether Triton
can run here, which `runtime.capabilities` knows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Kernels = Literal["torch", "triton"]

_chosen: Kernels = "torch"


def choose_kernels(kernels: Kernels) -> None:
    """Run these kernels from now on."""
    global _chosen
    _chosen = kernels


def uses_triton() -> bool:
    """Whether Triton's kernels run."""
    return _chosen == "triton"


@contextmanager
def kernels_chosen(kernels: Kernels) -> Iterator[None]:
    """These kernels inside, those of before behind it."""
    before = _chosen
    choose_kernels(kernels)
    try:
        yield
    finally:
        choose_kernels(before)
