"""Selective recomputation: activations that are cheap to make again are not kept.

A layer keeps the input of every linear module for the module's weight gradient. Three kinds of
these inputs cost a few passes over memory and no product to make again from what is kept anyway:
outputs of norms, of the MLP's activation, and attention's output in the projection's layout. With
`--recompute-granularity selective` autograd keeps in their place a note of how they were made, and
makes them again when a backward asks for them; which is exact to the bit, and needs no second
forward of the layer. `planning.activations` counts what is left.

A layer opens `remembering_how`; inside, whoever makes such a tensor calls `made_again`, or
`note_how` where the tensor comes out of a kernel that makes others too. Left out:
layers of TransformerEngine, which keep their inputs by themselves.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Make = Callable[[], Tensor]
Place = tuple[StorageWeakRef, int]


class _Notes:
    """How tensors of one layer's forward were made.

    They are held until the forward ends: storage that was freed could be that of another tensor.
    """

    def __init__(self) -> None:
        self._by_place: dict[Place, tuple[Tensor, Make]] = {}

    def add(self, output: Tensor, make: Make) -> None:
        """Note how a tensor was made."""
        self._by_place[_place(output)] = (output, make)

    def forget(self) -> None:
        """Let go of the tensors."""
        self._by_place.clear()

    def pack(self, tensor: Tensor) -> "Tensor | _Note":
        """What autograd keeps of a tensor."""
        noted = self._by_place.get(_place(tensor))
        if noted is None or not tensor.is_contiguous() or tensor.numel() != noted[0].numel():
            return tensor
        return _Note(noted[1], tensor.shape)


def _place(tensor: Tensor) -> Place:
    """Where a tensor begins. Not its address, which tensors without contents share."""
    return StorageWeakRef(tensor.untyped_storage()), int(tensor.storage_offset())


class _Note:
    """In the place of a tensor."""

    def __init__(self, make: Make, shape: torch.Size) -> None:
        self._make, self._shape = make, shape

    def unpack(self) -> Tensor:
        """The tensor, made again."""
        with torch.no_grad():
            return self._make().reshape(self._shape)


_notes: _Notes | None = None
"""Of the layer whose forward is running; None: everything is kept."""


@contextmanager
def remembering_how(*, is_on: bool) -> Iterator[None]:
    """Around a layer's forward: what goes through `made_again` inside is not kept.

    Args:
        is_on: whether to do so; otherwise this does nothing.
    """
    global _notes
    if not is_on or not torch.is_grad_enabled():
        yield
        return
    notes = _notes = _Notes()
    try:
        with torch.autograd.graph.saved_tensors_hooks(
            notes.pack, lambda kept: kept.unpack() if isinstance(kept, _Note) else kept
        ):
            yield
    finally:
        _notes = None
        notes.forget()  # autograd holds both hooks, and with them the notes, until the backward


def made_again(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), to be called again when a backward needs the result.

    Args:
        function: of tensors that are kept anyway, without randomness; does not change them.
        inputs: its arguments.
    """
    output = function(*inputs)
    note_how(output, function, *inputs)
    return output


def note_how(output: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Take `output` for the same bits as function(*inputs); see `made_again`."""
    if _notes is not None:
        kept = [tensor.detach() for tensor in inputs]
        _notes.add(output, lambda: function(*kept))
