"""Generation caches keys and values per layer.

A slot's keys and values depend on earlier slots only, so generation runs the layers over new slots
alone. One `KeyValueCache` is attached to the attention modules of a model during a generation. It
may hold several caches, since each pass over the same slots has its own keys and values
(`ponder.plan.DecodingPlan`).

Rows are texts of different lengths, and all begin at slot 0. The slots after a row's end contain
padding, which causal attention never sees and which the row overwrites as it grows. So a prompt
needs no mask, and the training forward computes it.

Left out: several new tokens per row after a prompt, and sharing the prefix of two rows.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

BLOCK_SLOTS = 256
"""Buffers grow by this many slots. Copying them once per block costs less than 1% of reading them,
which attention does for every slot."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewTokens:
    """Positions of one new token per row."""

    positions: Tensor
    """int64 [b], the token's position in the row's text, from 0."""
    rotary: Tensor | None
    """Cosines and sines [2, 1, b, 1, r] of the positions; None without rotary positions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    """Where a pass writes its slots."""

    cache: int
    start: int
    """First slot, if equal in all rows; 0 for whole prompts."""
    end: int
    """One past the last slot of the longest row."""
    slots: Tensor | None
    """int64 [b, q] if rows differ; None: from `start` on in every row."""
    mask: Tensor | None
    """Slots visible to each new slot, [b, 1, q, end]; None: all up to itself."""


class KeyValueCache:
    """Buffers per cache and layer, and the place for the slots of the current pass."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[int, int], Tensor] = {}
        self._place: _Place | None = None

    @contextlib.contextmanager
    def attached(self, attentions: Sequence[torch.nn.Module]) -> Iterator["KeyValueCache"]:
        """Attach the cache to these core attention modules until the block ends."""
        for attention in attentions:
            setattr(attention, "cache", self)
        try:
            yield self
        finally:
            for attention in attentions:
                setattr(attention, "cache", None)

    def keep_nothing(self) -> None:
        """The next pass runs over whole texts; do not keep its keys and values."""
        self._place = None

    def keep_prompt(self, cache: int, num_slots: int) -> None:
        """The next pass runs over whole texts, `num_slots` per row with padding; keep them."""
        self._place = _Place(cache=cache, start=0, end=num_slots, slots=None, mask=None)

    def add(self, cache: int, starts: Sequence[int], num_slots: int, device: torch.device) -> None:
        """The next pass runs over `num_slots` new slots per row.

        Args:
            cache: index of the cache.
            starts: number of slots that each row has already, [b].
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
        """Store the keys and values of new slots, and prepend those of earlier slots.

        Args:
            layer: layer number.
            key: [q, b, groups, d].
            value: [q, b, groups, d].

        Returns:
            Keys and values [k, b, groups, d], and the mask [b, 1, q, k] if rows differ.
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
            return key, value, None  # a whole text, from slot 0
        # [2, b, groups, k, d] -> [2, k, b, groups, d]
        keys, values = buffer[:, :, :, : place.end].permute(0, 3, 1, 2, 4)
        return keys, values, place.mask

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Drop all other rows."""
        for name, buffer in self._buffers.items():
            index = torch.tensor(rows, device=buffer.device)
            self._buffers[name] = buffer.index_select(1, index)

    def _buffer(self, name: tuple[int, int], num_slots: int, like: Tensor) -> Tensor:
        """The buffer [2, b, groups, capacity, d] of a cache and layer, grown if necessary."""
        old = self._buffers.get(name)
        if old is not None and old.size(3) >= num_slots:
            return old
        _, b, groups, d = like.shape
        capacity = -(-num_slots // BLOCK_SLOTS) * BLOCK_SLOTS
        # Zeros: empty slots are masked, but 0 * NaN would still be NaN.
        grown = like.new_zeros(2, b, groups, capacity, d)
        if old is not None:
            grown[:, :, :, : old.size(3)] = old
        self._buffers[name] = grown
        return grown
