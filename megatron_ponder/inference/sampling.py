"""Continues a text token by token, by the training path: correct, and slow.

Every new token recomputes the whole forward (growth, R rounds, loss pass) over everything before
it, so that the thoughts of the prompt are refined anew each time. Nothing is kept between tokens.
The seam for a cache of keys, values and thoughts is `generate`: it needs the logits behind the
last token and nothing else.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_ponder import log
from megatron_ponder.inference.loading import LoadedModel, loaded_model
from megatron_ponder.inference.options import GenerateOptions, SamplingOptions


def generate_text(options: GenerateOptions) -> str:
    """Do what tools/generate.py is asked for.

    Returns:
        The prompt and its continuation.

    Raises:
        PonderError: the checkpoint or its tokenizer cannot be used.
    """
    with loaded_model(options.checkpoint) as loaded:
        tokenizer = loaded.tokenizer()
        ids = tokenizer.tokenize(options.prompt)
        prompt = torch.tensor(ids or [tokenizer.eod])
        loaded.check_ids(prompt, "--prompt")
        total = options.sampling.max_new_tokens
        new: list[int] = []
        with log.progress(total=total, description="generating", unit=" tokens") as bar:
            for token in generate(loaded, prompt, options.sampling, end_id=tokenizer.eod):
                new.append(token)
                bar.update()
        # Together: alone, the first new token could lose a blank, or a character its first bytes.
        text = tokenizer.detokenize([*ids, *new])
        return options.prompt + text[len(tokenizer.detokenize(ids)) :]


def generate(
    loaded: LoadedModel, prompt: Tensor, options: SamplingOptions, end_id: int | None
) -> Iterator[int]:
    """New tokens after a prompt, one at a time, the same on all ranks.

    Where prompt and continuation outgrow the positions of the model, the oldest tokens are
    forgotten.

    Args:
        loaded: the model.
        prompt: int64 [s], s >= 1.
        options: how to choose, and how many at most.
        end_id: stop before this id; None: never.
    """
    longest = loaded.config.model.max_position_embeddings
    assert longest is not None
    generator = torch.Generator().manual_seed(options.seed)
    ids = prompt
    for _ in range(options.max_new_tokens):
        logits = loaded.logits(ids[-longest:].unsqueeze(0))[0, -1]
        token = choose(logits.cpu(), options, generator)
        if token == end_id:
            return
        yield token
        ids = torch.cat((ids, torch.tensor([token])))


def choose(logits: Tensor, options: SamplingOptions, generator: torch.Generator) -> int:
    """The next token.

    Args:
        logits: fp32 [v], on the CPU.
        options: temperature, top_k, top_p.
        generator: of the draw; not used by greedy choice.
    """
    if options.temperature == 0:
        return int(logits.argmax())
    values, order = logits.sort(descending=True, stable=True)
    probabilities = torch.softmax(values / options.temperature, dim=-1)
    if options.top_k:
        probabilities[options.top_k :] = 0
    if options.top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities
        # A token stays if those likelier than it do not have the mass yet; the first always does.
        probabilities[before >= options.top_p * probabilities.sum()] = 0
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
