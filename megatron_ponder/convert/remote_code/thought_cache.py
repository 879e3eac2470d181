"""Keys and values of a model with thoughts: counted in tokens outside, in slots inside.

`generate` counts tokens; the layers see K+1 slots per token (ponderlm2, pause), or the tokens once
per pass (ponderlm, loop). A ThoughtCache holds the stock caches that the layers write to, one per
pass, and answers everybody else in tokens. A stock cache that a user or `generate` made becomes one
when the model first sees it, so that whoever holds it sees tokens too.

Quantised caches and sliding windows are left out.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticCache


class ThoughtCache(Cache):
    """What earlier tokens left behind.

    Args:
        config: the model's configuration.
        max_tokens: capacity of preallocated (static) caches; None: caches grow.
        offloading: whether layers rest on the CPU while others work.
    """

    def __init__(
        self, config: Any, *, max_tokens: int | None = None, offloading: bool = False
    ) -> None:
        self.max_tokens = max_tokens
        self.offloading = offloading
        self.layer_class_to_replicate = None  # of the stock class: layers that come into being
        self._start(config)

    def _start(self, config: Any) -> None:
        """Empty caches for a model of this configuration."""
        self.config = config
        self.slots_per_token: int = config.slots_per_token
        self.num_tokens = 0
        self.jacobi_iterations: list[int] = []
        """Rounds that each part of the prompt was given, oldest first."""
        self.caches: list[Cache] = [self._new_cache() for _ in range(config.num_caches)]

    def _new_cache(self) -> Cache:
        if self.max_tokens is None:
            return DynamicCache(offloading=self.offloading)
        num_slots = self.max_tokens * self.slots_per_token
        return StaticCache(config=self.config, max_cache_len=num_slots, offloading=self.offloading)

    def fits(self, config: Any) -> bool:
        """Whether it has been made for a model with this method and number of thoughts."""
        shape = (self.slots_per_token, len(self.caches))
        return shape == (config.slots_per_token, config.num_caches)

    def add(self, num_tokens: int, num_rounds: int | None) -> None:
        """Count tokens whose slots have been written, after that many Jacobi rounds, if any."""
        self.num_tokens += num_tokens
        if num_rounds is not None:
            self.jacobi_iterations.append(num_rounds)

    def view(self, index: int) -> Cache:
        """What a pass has kept so far, for a pass that shall leave nothing behind."""
        num_slots = self.num_tokens * self.slots_per_token
        return Cache(layers=[SeenLayer(layer, num_slots) for layer in self.caches[index].layers])

    @property
    def layers(self) -> list[Any]:  # type: ignore[override]
        """All layers of all passes: what the stock class does to each works on every pass."""
        return [layer for cache in self.caches for layer in cache.layers]

    @property
    def is_compileable(self) -> bool:
        """No: `generate` would prepare masks of tokens where masks of slots are needed."""
        return False

    @property
    def max_cache_len(self) -> int:
        """Capacity in tokens, by a name of transformers 4; -1: none."""
        return -1 if self.max_tokens is None else self.max_tokens

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Tokens seen."""
        return self.num_tokens

    def get_max_length(self, *_: Any, **__: Any) -> int:
        """Capacity in tokens; -1: none."""
        return self.max_cache_len

    def get_max_cache_shape(self, *_: Any, **__: Any) -> int:
        """Capacity in tokens, by a name of transformers 4; -1: none."""
        return self.max_cache_len

    def crop(self, num_tokens: int) -> None:
        """Forget the newest tokens; the number means what it means to the stock cache."""
        for cache in self.caches:
            cache.crop(num_tokens * self.slots_per_token)
        self.num_tokens = int(self.caches[0].get_seq_length()) // self.slots_per_token

    def reset(self) -> None:
        """Forget everything; preallocated memory stays."""
        if self.max_tokens is None:
            self._start(self.config)
            return
        super().reset()  # type: ignore[no-untyped-call]
        self.num_tokens = 0
        self.jacobi_iterations = []


class SeenLayer(DynamicLayer):
    """A layer of a cache that lends what it has and takes nothing.

    Args:
        layer: dynamic or static, with keys [b, heads, slots, d].
        num_slots: how many of its slots are filled.
    """

    def __init__(self, layer: Any, num_slots: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys: Tensor = layer.keys[:, :, :num_slots]
        self.values: Tensor = layer.values[:, :, :num_slots]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """What was there and what is new, side by side."""
        device = key_states.device
        keys = torch.cat((self.keys.to(device), key_states), dim=-2)
        return keys, torch.cat((self.values.to(device), value_states), dim=-2)


def as_thought_cache(cache: Any, config: Any) -> ThoughtCache:
    """The cache, of which a stock one changes its class.

    The object stays the same: a conversation goes on by passing the cache that was passed before,
    and its owner has to see tokens.

    Raises:
        ValueError: it holds keys and values of another model, or is of a kind that cannot be used.
    """
    if isinstance(cache, ThoughtCache):
        if not cache.fits(config):
            if cache.num_tokens:
                raise ValueError(
                    f"The cache holds {cache.num_tokens} tokens of a model with other thoughts "
                    f"({cache.slots_per_token} slots per token, {len(cache.caches)} passes kept). "
                    "Start with a new cache."
                )
            cache._start(config)
        return cache
    if type(cache) not in (DynamicCache, StaticCache):
        raise ValueError(
            f"A {type(cache).__name__} cannot hold the slots of this model. Use a DynamicCache or "
            'a StaticCache (cache_implementation "dynamic", "offloaded" or "static").'
        )
    if int(cache.get_seq_length()) != 0:
        raise ValueError(
            "The cache has been filled without this model's thoughts. Start with an empty one, or "
            "with what this model returned."
        )
    is_static = isinstance(cache, StaticCache)
    max_tokens = cache.layers[0].max_cache_len if is_static else None
    offloading = cache.offloading
    del cache.layers, cache.layer_class_to_replicate
    cache.__class__ = ThoughtCache
    ThoughtCache.__init__(cache, config, max_tokens=max_tokens, offloading=offloading)
    assert isinstance(cache, ThoughtCache)
    return cache
