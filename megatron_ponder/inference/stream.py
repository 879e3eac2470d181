"""Reads the text to be scored: its ids, and how many bytes of text they stand for.

The same text gives the same ids and bytes whether it comes from a dataset or from files. Bytes are
those of the text before the tokenizer: a tokenizer may normalise it, so they cannot always be
counted from the ids. Where they are not known they are left out, with a warning.
"""

import dataclasses
import itertools
import logging
from collections.abc import Iterator

import numpy
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor

from megatron_ponder.data.encoding import num_utf8_bytes
from megatron_ponder.data.indexed import check_indexed_dataset, count_unended
from megatron_ponder.data.instruction_dataset import check_kind
from megatron_ponder.data.manifest import check_tokenizer, text_bytes
from megatron_ponder.data.readers import read_documents
from megatron_ponder.data.sources import find_inputs
from megatron_ponder.data.tokenizers import Tokenizer
from megatron_ponder.errors import DataError
from megatron_ponder.inference.options import EvaluateOptions

logger = logging.getLogger(__name__)

LONGEST_CHARACTER_TOKENS = 8
PROBE = (
    "  Two  Blanks\n\n\tand \r\n \u00c9 e\u0301 \ufb01 \u216b \uff21 \u00a0 \u200b \u4f60\u597d "
    "\U0001f600 "
)
"""Text that whatever changes text changes: case, blanks, line ends, forms of Unicode."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """A text as the model reads it."""

    ids: Tensor
    """int64 [n + 1]: an end id, then the n ids that are predicted."""
    num_bytes: int | None
    """UTF-8 bytes of the text; None where ids stand for no text, or it is not known."""


def read_stream(options: EvaluateOptions, tokenizer: Tokenizer, *, is_text: bool) -> Stream:
    """All documents of the input, up to --max-tokens.

    Args:
        options: one of `data_path` and `text_file` is given.
        tokenizer: the model's.
        is_text: whether ids stand for text.

    Raises:
        DataError: the input cannot be read, was made with another tokenizer, or holds no text.
    """
    prefix, limit = options.data_path, options.max_tokens
    if prefix is not None:
        documents = _indexed_documents(prefix, tokenizer)
    else:
        documents = _text_documents(options.text_file, tokenizer)
    parts: list[Tensor] = []
    num_tokens = num_bytes = 0
    is_whole = True
    for ids, size in documents:
        if limit is not None and num_tokens + len(ids) > limit:
            is_whole = False
            ids = _cut(ids, limit - num_tokens, tokenizer if is_text else None)
        parts.append(ids)
        num_tokens += len(ids)
        num_bytes += size
        if not is_whole:
            break
    source = prefix or " ".join(options.text_file)
    if num_tokens == 0:
        raise DataError(f"{source}: there is no text to score.")
    known: int | None = None
    if is_text:
        known = num_bytes
        if prefix is not None:
            known = text_bytes(prefix) if is_whole else None
        if not is_whole or known is None:
            known = _bytes_of_ids(source, parts, tokenizer, is_whole)
    return Stream(ids=torch.cat([torch.tensor([tokenizer.eod]), *parts]), num_bytes=known)


def _indexed_documents(prefix: str, tokenizer: Tokenizer) -> Iterator[tuple[Tensor, int]]:
    """Ids of each sequence of a dataset; their bytes are not known here."""
    check_indexed_dataset(prefix)
    check_tokenizer(prefix, tokenizer)
    check_kind(prefix, instruction_data=False)
    num_unended, number = count_unended(prefix, tokenizer.eod)
    if num_unended:
        logger.warning(
            "%s: %d of %d documents looked at do not end with an end id (made without "
            "--append-eod?); --text-file ends every document with one, so its figures differ",
            prefix,
            num_unended,
            number,
        )
    dataset = IndexedDataset(prefix)
    for index in range(len(dataset)):
        yield torch.from_numpy(dataset[index].astype(numpy.int64)), 0


def _text_documents(paths: tuple[str, ...], tokenizer: Tokenizer) -> Iterator[tuple[Tensor, int]]:
    """Ids and UTF-8 bytes of each document of text files that has any token."""
    num_empty = 0
    for document in read_documents(find_inputs(paths), "auto"):
        (text,) = document.texts(["text"])
        ids = tokenizer.tokenize(text)
        if ids:
            yield torch.tensor([*tokenizer.begin, *ids, tokenizer.eod]), num_utf8_bytes(text)
        else:
            num_empty += 1
    if num_empty:
        logger.warning(
            "%d documents without any token are left out, as preprocessing leaves them out",
            num_empty,
        )


def _cut(ids: Tensor, limit: int, tokenizer: Tokenizer | None) -> Tensor:
    """At most the first `limit` ids of a document, and no part of a character."""
    if tokenizer is not None:
        beyond = _text(tokenizer, ids[: limit + LONGEST_CHARACTER_TOKENS])
        for size in range(limit, max(limit - LONGEST_CHARACTER_TOKENS, 0), -1):
            if beyond.startswith(_text(tokenizer, ids[:size])):
                return ids[:size]
    return ids[:limit]


def _bytes_of_ids(
    source: str, parts: list[Tensor], tokenizer: Tokenizer, is_whole: bool
) -> int | None:
    """UTF-8 bytes of the text that ids stand for; None if the tokenizer changes text."""
    if tokenizer.detokenize(tokenizer.tokenize(PROBE)) != PROBE:
        logger.warning(
            "%s: no figures per byte. The tokenizer changes text, so its bytes cannot be counted "
            "from ids, and %s",
            source,
            "no manifest of these files states them: preprocess the corpus again, or give it as "
            "--text-file"
            if is_whole
            else "--max-tokens scores a part of it only: leave it out",
        )
        return None
    return sum(num_utf8_bytes(_text(tokenizer, ids)) for ids in parts)


def _text(tokenizer: Tokenizer, ids: Tensor) -> str:
    """The text of ids; begin and end of a document stand for none."""
    bounds = {tokenizer.eod, *tokenizer.begin}
    return tokenizer.detokenize(list(itertools.filterfalse(bounds.__contains__, ids.tolist())))
