"""The ids of a SentencePiece BPE model, up to twice as fast: each word is tokenized once.

A merge never reaches over a blank if no piece does, so that a text can be cut in front of runs of
blanks and each part be tokenized by itself, or looked up. That is exact only where nothing else
looks at the whole text: `word_cached` checks it in the model and refuses others. Unigram models are
among them, whose sums of likelihoods round differently over a whole text. Left out: other kinds of
tokenizers (Hugging Face's has a cache of its own).
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_ponder.data.tokenizers import SentencePieceTokenizer, Tokenizer
from megatron_ponder.errors import DataError

BLANK = "\u2581"
WORD = re.compile(r" *[^ ]+| +")
LONGEST_CACHED_CHARS = 48
MAX_WORDS = 1 << 20
"""Words that are kept; then the cache starts afresh. About 200 MB."""
BPE_MODEL, USER_DEFINED_PIECE = 2, 4


def word_cached(tokenizer: Tokenizer, model_file: Path) -> Tokenizer:
    """A tokenizer with the same ids that remembers words.

    Args:
        tokenizer: to be made faster.
        model_file: its model.

    Raises:
        DataError: the ids could differ.
    """
    if not isinstance(tokenizer, SentencePieceTokenizer):
        raise DataError("--word-cache is for SentencePiece models; leave it out.")
    problem = next(_problems(model_file.read_bytes()), None)
    if problem is not None:
        raise DataError(f"--word-cache cannot be used with {model_file}: {problem}. Leave it out.")
    return _WordCachedTokenizer(tokenizer)


class _WordCachedTokenizer(Tokenizer):
    """Looks words up."""

    def __init__(self, inner: SentencePieceTokenizer) -> None:
        self._inner = inner
        self._words = _Words(inner)
        self.vocab_size, self.eod = inner.vocab_size, inner.eod
        self.unique_identifiers = inner.unique_identifiers

    def tokenize(self, text: str) -> list[int]:
        """See Tokenizer."""
        if len(self._words) > MAX_WORDS:
            self._words.clear()
        # A blank that the text spells as SentencePiece does is one for SentencePiece too.
        words = WORD.findall(text.replace(BLANK, " "))
        return list(itertools.chain.from_iterable(map(self._words.__getitem__, words)))

    def detokenize(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return self._inner.detokenize(ids)


class _Words(dict[str, list[int]]):
    """Ids by word, tokenized when they are first asked for."""

    def __init__(self, tokenizer: SentencePieceTokenizer) -> None:
        self._tokenizer = tokenizer

    def __missing__(self, word: str) -> list[int]:
        ids = self._tokenizer.tokenize(word)
        if len(word) <= LONGEST_CACHED_CHARS:
            self[word] = ids
        return ids


def _problems(model: bytes) -> Iterator[str]:
    """What makes words depend on the text around them; fields of SentencePiece's ModelProto."""
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
        yield "it puts a blank in front of a text"
    if normalizer.get(4, 1):
        yield "it removes blanks"
    if not normalizer.get(5, 1):
        yield "it does not escape blanks"
    if any(piece.get(3, 1) == USER_DEFINED_PIECE for piece in pieces):
        yield "it has pieces that a user defined"
    texts = (text.decode() for piece in pieces if isinstance(text := piece.get(1), bytes))
    if any(BLANK in text.lstrip(BLANK) for text in texts):
        yield "it has pieces that go on behind a blank"


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Fields of a protobuf message: number and value; fixed-width ones as bytes.

    Raises:
        DataError: it is none.
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
        raise DataError("--word-cache: the model file is not understood; leave it out.") from None


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """A number at a place, and the place behind it."""
    number = shift = 0
    while True:
        byte = message[place]
        number |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return number, place
