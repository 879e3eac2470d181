"""Caches the ids of words for SentencePiece BPE models; up to twice as fast.

If no piece spans a space, no BPE merge does either. Text can then be split before runs of spaces,
and each part tokenized separately, or looked up. This is exact only if nothing else in the model
depends on the whole text: `word_cached` checks that and refuses other models. It refuses unigram
models because their sums of log probabilities round differently over a whole text. Not covered:
other tokenizers (that of Hugging Face has its own cache).
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ponder.data.tokenizers import BLANK, SentencePieceTokenizer, Tokenizer
from megatron_ponder.errors import DataError

WORD = re.compile(r" *[^ ]+| +")
LONGEST_CACHED_CHARS = 48
MAX_WORDS = 1 << 20
"""Maximum number of cached words (about 200 MB); then the cache is cleared."""
BPE_MODEL, USER_DEFINED_PIECE = 2, 4


def word_cached(tokenizer: Tokenizer, model_file: Path) -> Tokenizer:
    """Wrap a tokenizer with a cache of words; the ids are the same.

    Args:
        tokenizer: the tokenizer to wrap.
        model_file: its model.

    Raises:
        DataError: the ids might differ.
    """
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise DataError("--word-cache is only for SentencePiece models; leave it out.")
    problem = next(_problems(model_file.read_bytes()), None)
    if problem is not None:
        raise DataError(f"--word-cache cannot be used with {model_file}: {problem}. Leave it out.")
    return _WordCachedTokenizer(tokenizer)


class _WordCachedTokenizer(SentencePieceTokenizer):
    """Tokenizes word by word, with a cache."""

    def __init__(self, inner: SentencePieceTokenizer) -> None:
        vars(self).update(vars(inner))
        self._words = _Words(inner)

    def tokenize(self, text: str) -> list[int]:
        """See Tokenizer."""
        if len(self._words) > MAX_WORDS:
            self._words.clear()
        # SentencePiece treats its space symbol in a text as a space.
        words = WORD.findall(text.replace(BLANK, " "))
        return list(itertools.chain.from_iterable(map(self._words.__getitem__, words)))

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See Tokenizer."""
        return [self.tokenize(text) for text in texts]


class _Words(dict[str, list[int]]):
    """Ids by word, tokenized on first use."""

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, word: str) -> list[int]:
        ids = self._tokenizer.tokenize(word)
        if len(word) <= LONGEST_CACHED_CHARS:
            self[word] = ids
        return ids


def _problems(model: bytes) -> Iterator[str]:
    """Why words depend on the text around them; reads fields of SentencePiece's ModelProto."""
    pieces: list[dict[int, int | bytes]] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for field, value in _fields(model):
        if field == 1 and isinstance(value, bytes):
            pieces.append(dict(_fields(value)))
        elif field == 2 and isinstance(value, bytes):
            trainer = dict(_fields(value))
        elif field == 3 and isinstance(value, bytes):
            normalizer = dict(_fields(value))
    if trainer.get(3, 1) != BPE_MODEL:
        yield "it is not a BPE model"
    if normalizer.get(2):
        yield "it normalises text"
    if normalizer.get(3, 1):
        yield "it adds a dummy prefix"
    if normalizer.get(4, 1):
        yield "it removes extra white space"
    if not normalizer.get(5, 1):
        yield "it does not escape white space"
    if any(piece.get(3, 1) == USER_DEFINED_PIECE for piece in pieces):
        yield "it has user-defined pieces"
    texts = (
        text.decode(errors="replace") for piece in pieces if isinstance(text := piece.get(1), bytes)
    )
    if any(BLANK in text.lstrip(BLANK) for text in texts):
        yield "it has pieces that span a space"


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Fields of a protobuf message as (number, value); fixed-width values as bytes.

    Raises:
        DataError: the message cannot be parsed.
    """
    place = 0
    try:
        while place < len(message):
            tag, place = _varint(message, place)
            kind = tag & 7
            if kind == 0:
                number, place = _varint(message, place)
                yield tag >> 3, number
                continue
            if kind == 2:
                size, place = _varint(message, place)
            else:
                size = {1: 8, 5: 4}[kind]
            yield tag >> 3, message[place : place + size]
            place += size
    except (IndexError, KeyError):
        raise DataError(
            "--word-cache: the model file cannot be parsed; leave --word-cache out."
        ) from None


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """The varint at a position, and the position after it."""
    number = shift = 0
    while True:
        byte = message[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number, place
