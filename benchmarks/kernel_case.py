"""One kernel at one shape: what it is called with, and what it replaces.

A case knows the function of `kernels/`, its eager chain (the same in torch's ordinary operations,
differentiated by autograd), inputs at a shape, and how many bytes the formula has to move at least.
Whether a kernel has a Triton form is seen from its module.
"""

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_ponder.config.resolved import ResolvedConfig

Function = Callable[..., Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a model's longest pass over one micro-batch."""

    tokens: int
    batch: int
    stages: int
    hidden: int
    ffn: int
    groups: int
    heads: int
    head_dim: int
    rotated: int
    vocabulary: int

    @property
    def slots(self) -> int:
        """Slots in a sequence."""
        return self.tokens * self.stages

    @property
    def token_values(self) -> int:
        """Numbers in the embeddings of all tokens."""
        return self.tokens * self.batch * self.hidden

    @property
    def qkv_width(self) -> int:
        """Of the joint projection."""
        return (self.heads + 2 * self.groups) * self.head_dim


def sizes_of(config: ResolvedConfig) -> Sizes:
    """Of a resolved run; at least two stages, so that there is something to interleave."""
    model = config.model
    return Sizes(
        tokens=config.data.seq_length,
        batch=config.training.micro_batch_size,
        stages=max(2, config.method.num_latent_thoughts + 1),
        hidden=model.hidden_size,
        ffn=model.ffn_hidden_size,
        groups=model.num_query_groups,
        heads=model.num_attention_heads,
        head_dim=model.kv_channels,
        rotated=int(model.rotary_percent * model.kv_channels),
        vocabulary=model.vocab_size,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelCase:
    """One kernel at one shape."""

    name: str
    kernel: Function
    """A call of it; of the inputs only."""
    eager: Function
    """The same in ordinary operations."""
    inputs: dict[str, Tensor]
    """What both take, in order."""
    leaves: tuple[str, ...] = ()
    """Inputs with a gradient; none: the kernel is not differentiated."""
    forward_values: int
    """Numbers of the run's dtype that the forward moves at least."""
    backward_values: int = 0
    """The same of the backward."""
    defined_in: Function
    """A function of its module."""

    @property
    def has_triton(self) -> bool:
        """Whether its module dispatches to a Triton form."""
        return hasattr(sys.modules[self.defined_in.__module__], "uses_triton")


class Inputs:
    """Random tensors of a dtype on a device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        """The same ones every time."""
        self._dtype, self._device = dtype, device
        self._generator = torch.Generator(device).manual_seed(1)

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed, in the inputs' dtype unless another is given."""
        x = torch.randn(shape, generator=self._generator, device=self._device)
        return x.to(dtype or self._dtype)

    def ids(self, below: int, *shape: int) -> Tensor:
        """int64, each below `below`."""
        return torch.randint(below, shape, generator=self._generator, device=self._device)
