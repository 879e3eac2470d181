"""Chooses the next token from its logits: the likeliest, or a draw from the likelier ones."""

import torch
from torch import Tensor

from megatron_ponder.inference.options import SamplingOptions


def choose(
    logits: Tensor,
    options: SamplingOptions,
    generators: list[torch.Generator],
    unused: Tensor | None = None,
) -> list[int]:
    """The next token of each text.

    Args:
        logits: fp32 [b, v].
        options: temperature, top_k, top_p.
        generators: of the draws, on the CPU, one per text, so that what is drawn for a text does
            not depend on its company; not used by greedy choice.
        unused: bool [v], rows of the vocabulary that no token has; they are never chosen.
    """
    if unused is not None:
        logits = logits.masked_fill(unused, -torch.inf)
    if options.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    # The CPU draws: its generators give the same numbers everywhere.
    rows = zip(logits.cpu(), generators, strict=True)
    return [_draw(row, options, generator) for row, generator in rows]


def _draw(logits: Tensor, options: SamplingOptions, generator: torch.Generator) -> int:
    """A draw from softmax(logits [v] / temperature), cut to the likeliest tokens."""
    if options.top_k:
        values, order = logits.topk(min(options.top_k, logits.numel()))
    elif options.top_p < 1:
        values, order = logits.sort(descending=True, stable=True)
    else:
        probabilities = torch.softmax(logits / options.temperature, dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=generator))
    probabilities = torch.softmax(values / options.temperature, dim=-1)
    if options.top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities
        # A token stays if those likelier than it do not have the mass yet; the first always does.
        probabilities[before >= options.top_p] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
