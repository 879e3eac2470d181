"""State dicts under Hugging Face names and under ours, by the rules of a model's family.

An export and an import apply the same rules one parameter at a time (`rules_of`); the functions
here convert whole state dicts.
"""

import dataclasses
from collections.abc import Mapping

from torch import Tensor

from megatron_ponder.config.resolved import ResolvedModelConfig
from megatron_ponder.convert.family import find_family
from megatron_ponder.convert.weight_rules import OUTPUT_LAYER, Rule
from megatron_ponder.errors import ConversionError


def to_megatron(state: Mapping[str, Tensor], model: ResolvedModelConfig) -> dict[str, Tensor]:
    """Our state dict from stock Hugging Face tensors.

    Args:
        state: tensors by Hugging Face name; for tied embeddings the head may be repeated.
        model: the resolved shape.

    Raises:
        ConversionError: a tensor is missing, superfluous or has another shape than the rule needs.
    """
    result = {}
    unused = set(state)
    if not model.untie_embeddings_and_output_weights:
        unused.discard(find_family(model.architecture).head)
    for rule in rules_of(model):
        missing = [name for name in rule.theirs if name not in state]
        if missing:
            raise ConversionError(
                f"The checkpoint lacks {', '.join(missing)}, needed for {rule.ours}. Is it a "
                f"{model.architecture} model with {model.num_layers} layers?"
            )
        result[rule.ours] = rule.join([state[name] for name in rule.theirs], model)
        unused -= set(rule.theirs)
    if unused:
        raise ConversionError(
            f"The checkpoint has tensors that a {model.architecture} model of this shape does not: "
            f"{', '.join(sorted(unused)[:5])}."
        )
    return result


def to_huggingface(state: Mapping[str, Tensor], model: ResolvedModelConfig) -> dict[str, Tensor]:
    """Stock Hugging Face tensors from our state dict (whole tensors); the inverse of `to_megatron`.

    A tied head is not repeated.
    """
    result: dict[str, Tensor] = {}
    for rule in rules_of(model):
        result.update(zip(rule.theirs, rule.split(state[rule.ours], model), strict=True))
    return result


def rules_of(model: ResolvedModelConfig) -> list[Rule]:
    """The rules of a model, layer numbers filled in, in the order of the layers.

    Without a head if it is tied.
    """
    rules = [rule for rule in find_family(model.architecture).rules if rule.when(model)]
    of_layers = [rule for rule in rules if "{i}" in rule.ours]
    first = rules.index(of_layers[0])
    behind = rules[first + len(of_layers) :]
    if not model.untie_embeddings_and_output_weights:
        behind = [rule for rule in behind if rule.ours != OUTPUT_LAYER]
    filled = [
        dataclasses.replace(
            rule, ours=rule.ours.format(i=i), theirs=tuple(name.format(i=i) for name in rule.theirs)
        )
        for i in range(model.num_layers)
        for rule in of_layers
    ]
    return [*rules[:first], *filled, *behind]
