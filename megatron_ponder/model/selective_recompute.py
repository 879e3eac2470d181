"""Selective recompute: activations that are cheap to compute again are not kept.

A layer keeps the input of every linear module for its weight gradient. Three kinds of these inputs
can be recomputed from other kept tensors in a few passes over memory, without a matmul: outputs of
norms, of the MLP's activation, and attention's output in the order of dims that the projection
needs. With `--recompute-granularity selective` autograd keeps a recipe in place of each, and
recomputes it when a backward asks for it. The result is exact to the bit and needs no second
forward of the layer. `planning.activations` counts what is left.

A layer opens `selective_recompute`; code inside it calls `recomputable`, or `mark_recomputable` for
a tensor from a kernel with several outputs. Left out: TransformerEngine's layers, which keep their
inputs themselves.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Recipe = Callable[[], Tensor]
Place = tuple[StorageWeakRef, int]


class _Recipes:
    """How to recompute tensors of one layer's forward.

    The tensors are held until the forward ends: freed storage could be reused by another tensor.
    """

    def __init__(self) -> None:
        self._by_place: dict[Place, tuple[Tensor, Recipe]] = {}

    def add(self, output: Tensor, recipe: Recipe) -> None:
        """Remember how to recompute a tensor."""
        self._by_place[_place(output)] = (output, recipe)

    def clear(self) -> None:
        """Release the tensors."""
        self._by_place.clear()

    def pack(self, tensor: Tensor) -> "Tensor | _Recomputed":
        """What autograd keeps in place of a tensor."""
        found = self._by_place.get(_place(tensor))
        if found is None or not tensor.is_contiguous() or tensor.numel() != found[0].numel():
            return tensor
        return _Recomputed(found[1], tensor.shape)


def _place(tensor: Tensor) -> Place:
    """Where a tensor begins. Not its address, which tensors without contents share."""
    return StorageWeakRef(tensor.untyped_storage()), int(tensor.storage_offset())


class _Recomputed:
    """Kept in place of a tensor."""

    def __init__(self, recipe: Recipe, shape: torch.Size) -> None:
        self._recipe, self._shape = recipe, shape

    def unpack(self) -> Tensor:
        """The tensor, computed again."""
        with torch.no_grad():
            return self._recipe().reshape(self._shape)


_recipes: _Recipes | None = None
"""Of the layer whose forward is running; None: everything is kept."""


@contextmanager
def selective_recompute(*, is_on: bool) -> Iterator[None]:
    """Around a layer's forward: outputs of `recomputable` inside it are not kept.

    Args:
        is_on: whether to recompute; otherwise everything is kept.
    """
    global _recipes
    if not is_on or not torch.is_grad_enabled():
        yield
        return
    recipes = _recipes = _Recipes()
    try:
        with torch.autograd.graph.saved_tensors_hooks(
            recipes.pack, lambda kept: kept.unpack() if isinstance(kept, _Recomputed) else kept
        ):
            yield
    finally:
        _recipes = None
        recipes.clear()  # autograd holds the hooks, and with them the recipes, until the backward


def recomputable(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """function(*inputs), recomputed when a backward needs the result.

    Args:
        function: deterministic, without side effects, of tensors that are kept anyway.
        inputs: its arguments.
    """
    output = function(*inputs)
    mark_recomputable(output, function, *inputs)
    return output


def mark_recomputable(output: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Declare that function(*inputs) computes the bits of `output`; see `recomputable`."""
    if _recipes is not None:
        kept = [tensor.detach() for tensor in inputs]
        _recipes.add(output, lambda: function(*kept))
