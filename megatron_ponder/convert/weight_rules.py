"""Rules from stock Hugging Face tensors to our parameters and back, of which families are made.

Tensors are whole (tensor-parallel size 1), and unpadded on the Hugging Face side. Nothing here
reads or writes files, and nothing depends on the training method: thoughts add no parameters.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_ponder.config.layout import padded_vocab_size
from megatron_ponder.config.resolved import ResolvedModelConfig
from megatron_ponder.errors import ConversionError

Join = Callable[[list[Tensor], ResolvedModelConfig], Tensor]
Split = Callable[[Tensor, ResolvedModelConfig], list[Tensor]]
Condition = Callable[[ResolvedModelConfig], bool]

OUTPUT_LAYER = "output_layer.weight"
OUR_LAYER = "decoder.layers.{i}"


def always(model: ResolvedModelConfig) -> bool:
    """The condition of a parameter that every model of the family has."""
    return True


@dataclasses.dataclass(frozen=True)
class Rule:
    """`ours` is `join` of `theirs`; `theirs` is `split` of `ours`. `{i}` stands for the layer."""

    ours: str
    theirs: tuple[str, ...]
    join: Join
    split: Split
    when: Condition = always
    """Whether a model has the parameter."""


def _pad_vocab(parts: list[Tensor], model: ResolvedModelConfig) -> Tensor:
    """[vocab, h] -> [padded vocab, h]; padded rows are zero."""
    (weight,) = parts
    if weight.size(0) != model.vocab_size:
        raise ConversionError(
            f"The checkpoint's vocabulary has {weight.size(0)} rows, ours {model.vocab_size}."
        )
    padding = padded_vocab_size(model) - weight.size(0)
    return torch.cat((weight, weight.new_zeros(padding, weight.size(1))))


def _strip_vocab(weight: Tensor, model: ResolvedModelConfig) -> list[Tensor]:
    """[padded vocab, h] -> [vocab, h]."""
    return [weight[: model.vocab_size].contiguous()]


def _by_group(weight: Tensor, model: ResolvedModelConfig) -> Tensor:
    """[groups * n * d, ...] -> [groups, n, d, ...]."""
    return weight.reshape(model.num_query_groups, -1, model.kv_channels, *weight.shape[1:])


def join_qkv(parts: list[Tensor], model: ResolvedModelConfig) -> Tensor:
    """Q [heads * d, ...], K and V [groups * d, ...] -> [groups * (heads / groups + 2) * d, ...].

    megatron-core keeps each group's queries, key and value together, so that a contiguous shard of
    rows is a set of whole groups.
    """
    rest = parts[0].shape[1:]
    by_group = [_by_group(part, model) for part in parts]
    return torch.cat(by_group, dim=1).reshape(-1, *rest)


def split_qkv(weight: Tensor, model: ResolvedModelConfig) -> list[Tensor]:
    """The inverse of `join_qkv`."""
    rest = weight.shape[1:]
    by_group = _by_group(weight, model)
    queries = by_group.size(1) - 2
    return [part.reshape(-1, *rest).contiguous() for part in by_group.split((queries, 1, 1), dim=1)]


def same(ours: str, theirs: str, when: Condition = always) -> Rule:
    """The same tensor under another name."""
    return Rule(ours, (theirs,), lambda parts, _: parts[0], lambda weight, _: [weight], when)


def both(ours: str, theirs: str, rule: Callable[[str, str], Rule] = same) -> list[Rule]:
    """Weight and bias; a bias is never transposed."""
    return [rule(f"{ours}.weight", f"{theirs}.weight"), same(f"{ours}.bias", f"{theirs}.bias")]


def vocabulary(ours: str, theirs: str) -> Rule:
    """A table with a row per token id: padded on our side only."""
    return Rule(ours, (theirs,), _pad_vocab, _strip_vocab)
