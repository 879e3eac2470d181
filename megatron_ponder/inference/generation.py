"""Continues texts with a trained model, several at a time.

What a forward computes and what is kept of it is `continuation`'s business, the choice of a token
`sampling`'s; here texts are put into batches, grow until they end, and become text again. A text
ends at the end id, after so many new tokens, or where a table of learned positions does.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_ponder import log
from megatron_ponder.data.tokenizers import Tokenizer
from megatron_ponder.errors import DataError
from megatron_ponder.inference.continuation import continuation
from megatron_ponder.inference.loading import LoadedModel, loaded_model
from megatron_ponder.inference.options import GenerateOptions, SamplingOptions
from megatron_ponder.inference.sampling import choose
from megatron_ponder.inference.streaming import TextStream
from megatron_ponder.runtime.device import device

logger = logging.getLogger(__name__)

END, MAX_NEW_TOKENS, MAX_POSITIONS = "end", "max_new_tokens", "max_positions"
"""Why a text has ended."""


@dataclasses.dataclass(kw_only=True)
class GrowingText:
    """A text that is being continued."""

    prompt: Tensor
    """int64 [s], s >= 1."""
    generator: torch.Generator
    """Of its draws."""
    new_ids: list[int] = dataclasses.field(default_factory=list)
    """What was generated, without the end id."""
    finish_reason: str | None = None
    """Why it ended; None: unfinished."""

    @property
    def num_tokens(self) -> int:
        """Of prompt and continuation."""
        return len(self.prompt) + len(self.new_ids)


def run(options: GenerateOptions, write: Callable[[str], Any]) -> dict[str, Any]:
    """Do what tools/generate.py is asked for.

    Args:
        options: which texts, and how.
        write: takes pieces of what is to be shown, as they come; called on every rank alike.

    Returns:
        What --json prints, by name.

    Raises:
        PonderError: the checkpoint, its tokenizer or the prompts cannot be used.
    """
    prompts = list(options.prompt)
    if options.prompt_file is not None:
        prompts = read_prompts(Path(options.prompt_file))
    with loaded_model(options.checkpoint, options.num_jacobi_iterations) as loaded:
        tokenizer = loaded.tokenizer()
        texts = _start(loaded, tokenizer, prompts, options.sampling)
        start_s = time.monotonic()
        if len(texts) == 1:
            _stream(loaded, tokenizer, prompts[0], texts[0], options, write)
        else:
            _generate_all(loaded, tokenizer, prompts, texts, options, write)
        elapsed_s = time.monotonic() - start_s
        config = loaded.config
        num_new = sum(len(text.new_ids) for text in texts)
        trained_tokens = config.data.seq_length
        return {
            "checkpoint": str(loaded.checkpoint),
            "method": config.method.method,
            "num_latent_thoughts": config.method.num_latent_thoughts,
            "num_jacobi_iterations": config.method.num_jacobi_iterations,
            "use_cache": options.use_cache,
            "sampling": dataclasses.asdict(options.sampling),
            "num_new_tokens": num_new,
            "elapsed_s": elapsed_s,
            "tokens_per_s": num_new / elapsed_s,
            "seq_length": trained_tokens,
            "num_longer_texts": sum(text.num_tokens > trained_tokens for text in texts),
            "texts": [
                {
                    "prompt": prompt,
                    "text": _text(tokenizer, text),
                    "num_prompt_tokens": len(text.prompt),
                    "num_new_tokens": len(text.new_ids),
                    "finish_reason": text.finish_reason,
                }
                for prompt, text in zip(prompts, texts, strict=True)
            ],
        }


def generate(
    loaded: LoadedModel,
    texts: Sequence[GrowingText],
    sampling: SamplingOptions,
    *,
    end_id: int | None,
    use_cache: bool,
    unused: Tensor | None = None,
) -> Iterator[tuple[GrowingText, int]]:
    """Continue a batch of texts until all have ended, the same on all ranks.

    Args:
        loaded: the model.
        texts: changed as they grow.
        sampling: how to choose, and how many tokens at most.
        end_id: a text ends before this id; None: never.
        use_cache: whether keys and values are kept.
        unused: bool [v], rows of the vocabulary that no token has; None: all are tokens.

    Yields:
        A text and the token that was put behind it.
    """
    rows = list(texts)
    with continuation(loaded.model, loaded.plan, use_cache=use_cache) as growing:
        logits = growing.begin([text.prompt for text in rows])
        while True:
            chosen = choose(logits, sampling, [text.generator for text in rows], unused)
            for text, token in zip(rows, chosen, strict=True):
                if token == end_id:
                    text.finish_reason = END
                    continue
                text.new_ids.append(token)
                if len(text.new_ids) == sampling.max_new_tokens:
                    text.finish_reason = MAX_NEW_TOKENS
                elif loaded.max_tokens is not None and text.num_tokens > loaded.max_tokens:
                    text.finish_reason = MAX_POSITIONS
                yield text, token
            going_on = [row for row, text in enumerate(rows) if text.finish_reason is None]
            if not going_on:
                return
            if len(going_on) < len(rows):
                growing.keep_rows(going_on)
                rows = [rows[row] for row in going_on]
            logits = growing.add([text.new_ids[-1] for text in rows])


def read_prompts(path: Path) -> list[str]:
    """The texts of a prompt file.

    Raises:
        DataError: it cannot be read, or a line is not what it should be.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(f"--prompt-file {path}: {reason}.") from None
    numbered = [(number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise DataError(f"--prompt-file {path}: there is no text in it.")
    if path.suffix != ".jsonl":
        return [line.removesuffix("\r") for _, line in numbered]
    return [_prompt_of(line, f"--prompt-file {path}, line {number}") for number, line in numbered]


def _prompt_of(line: str, source: str) -> str:
    """The prompt in a line of JSON."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{source}: not JSON ({error}).") from None
    found = [value[key] for key in ("prompt", "text") if isinstance(value, dict) and key in value]
    if not found or not isinstance(found[0], str):
        raise DataError(f'{source}: must be an object with a string under "prompt" or "text".')
    return found[0]


def _start(
    loaded: LoadedModel, tokenizer: Tokenizer, prompts: Sequence[str], sampling: SamplingOptions
) -> list[GrowingText]:
    """The prompts as ids; an empty one begins a new document."""
    texts = []
    for number, prompt in enumerate(prompts):
        plain = tokenizer.tokenize(prompt)
        ids = torch.tensor([*tokenizer.begin, *plain] or [tokenizer.eod])
        source = "the prompt" if len(prompts) == 1 else f"prompt {number + 1}"
        for kind, count in tokenizer.losses(prompt, plain).items():
            logger.warning(
                "%s has characters that the model does not see: %d %s", source, count, kind
            )
        loaded.check_ids(ids, source)
        if loaded.max_tokens is not None and len(ids) > loaded.max_tokens:
            raise DataError(
                f"{source} has {len(ids)} tokens, but the model has learned positions for "
                f"{loaded.max_tokens}. Shorten it."
            )
        generator = torch.Generator().manual_seed(sampling.seed + number)
        texts.append(GrowingText(prompt=ids, generator=generator))
    return texts


def _stream(
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    prompt: str,
    text: GrowingText,
    options: GenerateOptions,
    write: Callable[[str], Any],
) -> None:
    """Continue one text and show it as it grows."""
    stream = TextStream(tokenizer, text.prompt.tolist())
    write(prompt)
    for _, token in _generate(loaded, tokenizer, [text], options):
        write(stream.add(token))
    write(stream.finish() + "\n")


def _generate_all(
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    texts: Sequence[GrowingText],
    options: GenerateOptions,
    write: Callable[[str], Any],
) -> None:
    """Continue many texts, those of about the same length together, and show them in order."""
    by_length = sorted(texts, key=lambda text: len(text.prompt))
    total = len(texts) * options.sampling.max_new_tokens
    with log.progress(total=total, description="generating", unit=" tokens") as bar:
        for first in range(0, len(texts), options.micro_batch_size):
            batch = by_length[first : first + options.micro_batch_size]
            for _ in _generate(loaded, tokenizer, batch, options):
                bar.update()
    for number, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1):
        write(f"--- {number} of {len(texts)}\n{prompt}{_text(tokenizer, text)}\n")


def _generate(
    loaded: LoadedModel,
    tokenizer: Tokenizer,
    texts: Sequence[GrowingText],
    options: GenerateOptions,
) -> Iterator[tuple[GrowingText, int]]:
    """`generate` with the tokenizer's end id, among its tokens."""
    return generate(
        loaded,
        texts,
        options.sampling,
        end_id=tokenizer.eod,
        use_cache=options.use_cache,
        unused=_unused_rows(tokenizer, loaded.vocab_size),
    )


def _unused_rows(tokenizer: Tokenizer, vocab_size: int) -> Tensor | None:
    """Rows of the vocabulary that no token has, bool [v]; None if every row is a token's."""
    ids = tokenizer.token_ids()
    if len(ids) == vocab_size:
        return None
    unused = torch.ones(vocab_size, dtype=torch.bool)
    unused[list(ids)] = False
    return unused.to(device())


def _text(tokenizer: Tokenizer, text: GrowingText) -> str:
    """The continuation, as it is streamed."""
    stream = TextStream(tokenizer, text.prompt.tolist())
    return "".join([*map(stream.add, text.new_ids), stream.finish()])
