"""Keys and values of the slots before, kept while a text is generated.

A slot's keys and values depend on earlier slots only. So whoever adds tokens to a text keeps them,
for each layer, and runs the layers over the new slots alone. One `KeyValueCache` is set on the
attention modules of a model for the length of a generation; it may hold several caches, because
passes over the same slots have keys and values of their own (`ponder.plan.DecodingPlan`).

Rows are texts of different lengths. All begin at slot 0; the slots behind a row's end hold what
padding left there, are seen by nobody, and are overwritten as the row grows. So a prompt needs no
mask, and the training forward computes it.

Left out: several tokens per row behind a prompt, and sharing the prefix of two rows.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK_SLOTS = 256
"""Buffers grow by this much. Copying them once per block costs less than a hundredth of reading
them, which attention does for every slot."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewTokens:
    """Where one new token per row is."""

    positions: Tensor
    """int64 [b], its place in the row's text, from 0."""
    rotary: Tensor | None
    """Cosines and sines [2, 1, b, 1, r] of the places; None without rotary positions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    """Where the slots of a pass go."""

    cache: int
    start: int
    """First slot, where it is the same in all rows; 0 also for whole prompts."""
    end: int
    """Behind the last slot of the longest row."""
    slots: Tensor | None
    """int64 [b, q] where rows differ; None: from `start` on in every row."""
    mask: Tensor | None
    """Which slots each new one sees, [b, 1, q, end]; None: all up to itself."""


class KeyValueCache:
    """Buffers per cache and layer, and where the pass that runs puts its slots."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, int], Tensor] = {}
        self._place: _Place | None = None

    @contextlib.contextmanager
    def attached(self, attentions: Sequence[torch.nn.Module]) -> Iterator["KeyValueCache"]:
        """Let these core attentions keep and read keys and values here until the block ends."""
        for attention in attentions:
            setattr(attention, "cache", self)
        try:
            yield self
        finally:
            for attention in attentions:
                setattr(attention, "cache", None)

    def keep_nothing(self) -> None:
        """The next pass runs over whole texts, and its keys and values are not needed again."""
        self._place = None

    def keep_prompt(self, cache: int, num_slots: int) -> None:
        """The next pass runs over whole texts, `num_slots` per row with padding, into a cache."""
        self._place = _Place(cache=cache, start=0, end=num_slots, slots=None, mask=None)

    def add(self, cache: int, starts: Sequence[int], num_slots: int, device: torch.device) -> None:
        """The next pass runs over `num_slots` new slots per row.

        Args:
            cache: number of the cache.
            starts: slots that each row has already, [b].
            num_slots: q, new slots per row.
            device: of keys and values.
        """
        end = max(starts) + num_slots
        if min(starts) == max(starts):
            place = _Place(cache=cache, start=starts[0], end=end, slots=None, mask=None)
        else:
            first = torch.tensor(starts, device=device)
            slots = first[:, None] + torch.arange(num_slots, device=device)
            mask = torch.arange(end, device=device) <= slots[:, None, :, None]
            place = _Place(cache=cache, start=min(starts), end=end, slots=slots, mask=mask)
        self._place = place

    def extend(
        self, layer: int, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keep the keys and values of new slots, and put those of earlier slots before them.

        Args:
            layer: number of the layer.
            key: [q, b, groups, d].
            value: [q, b, groups, d].

        Returns:
            Keys and values [k, b, groups, d], and the mask [b, 1, q, k] where rows differ.
        """
        place = self._place
        if place is None:
            return key, value, None
        buffer = self._buffer((place.cache, layer), place.end, key)
        for kept, given in zip(buffer, (key, value), strict=True):
            new = given.permute(1, 2, 0, 3)  # [q, b, groups, d] -> [b, groups, q, d]
            if place.slots is None:
                kept[:, :, place.start : place.end] = new
            else:
                kept.scatter_(2, place.slots[:, None, :, None].expand_as(new), new)
        if place.start == 0 and place.slots is None:
            return key, value, None  # a whole text: nothing is before it
        # [2, b, groups, k, d] -> [2, k, b, groups, d]
        keys, values = buffer[:, :, :, : place.end].permute(0, 3, 1, 2, 4)
        return keys, values, place.mask

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Forget all rows but these."""
        for name, buffer in self._buffers.items():
            index = torch.tensor(rows, device=buffer.device)
            self._buffers[name] = buffer.index_select(1, index)

    def _buffer(self, name: tuple[int, int], num_slots: int, like: Tensor) -> Tensor:
        """The buffer [2, b, groups, capacity, d] of a cache and layer, grown if it has to be."""
        old = self._buffers.get(name)
        if old is not None and old.size(3) >= num_slots:
            return old
        _, b, groups, d = like.shape
        capacity = -(-num_slots // BLOCK_SLOTS) * BLOCK_SLOTS
        # Zeros: what no slot has filled is masked, but zero times NaN would not be.
        grown = like.new_zeros(2, b, groups, capacity, d)
        if old is not None:
            grown[:, :, :, : old.size(3)] = old
        self._buffers[name] = grown
        return grown
