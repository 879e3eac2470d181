"""Encodes documents into token ids, inside a worker.

An encoder turns each document of a batch into one array per *stream*. Each stream becomes a
dataset. Texts have one stream per JSON key; conversations (conversations.py) have two, ids and loss
mask.
"""

import abc
import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy

from megatron_ponder.data.documents import DocumentError, RawDocument
from megatron_ponder.data.tokenizers import Tokenizer
from megatron_ponder.errors import DataError

Encoded = list[numpy.ndarray] | DocumentError
"""One array per stream, or the reason for rejection."""


@dataclasses.dataclass(frozen=True)
class Stream:
    """A dataset to be written: PREFIX_<name>.bin and .idx."""

    name: str
    dtype: type[numpy.number]


class Encoder(abc.ABC):
    """Encodes documents into arrays."""

    streams: list[Stream]
    tokenizer: Tokenizer
    keys: Sequence[str]
    """Keys of JSON objects that are read."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.losses: collections.Counter[str] = collections.Counter()
        """What the ids do not give back: `texts`, and characters by kind (Tokenizer.losses)."""
        self.text_bytes: collections.Counter[str] = collections.Counter()
        """UTF-8 bytes of the texts that are kept, by stream."""

    def count_losses(self, texts: Sequence[str], ids: Sequence[list[int]]) -> None:
        """Count what is lost in the texts of a document that is kept."""
        for text, mine in zip(texts, ids, strict=True):
            if lost := self.tokenizer.losses(text, mine):
                self.losses.update(lost, texts=1)

    @abc.abstractmethod
    def encode(self, documents: Sequence[RawDocument]) -> list[Encoded]:
        """Encode each document: its arrays, or the reason for its rejection, in order."""


class TextEncoder(Encoder):
    """Encodes the text under each key, between begin and end ids where these are wanted."""

    def __init__(self, tokenizer: Tokenizer, keys: Sequence[str], append_eod: bool) -> None:
        super().__init__(tokenizer)
        self.keys = keys
        self._end = [tokenizer.eod] if append_eod else []
        self._dtype = token_dtype(tokenizer.vocab_size)
        self.streams = [Stream(f"{key}_document", self._dtype) for key in keys]

    def encode(self, documents: Sequence[RawDocument]) -> list[Encoded]:
        """See Encoder."""
        results: list[Encoded] = []
        texts: list[list[str]] = []
        for document in documents:
            try:
                texts.append(document.texts(self.keys))
                results.append([])
            except DocumentError as error:
                texts.append([])
                results.append(error)
        ids = iter(tokenize_batch(self.tokenizer, list(itertools.chain.from_iterable(texts))))
        for index, (document, result) in enumerate(zip(documents, results, strict=True)):
            if isinstance(result, list):
                mine = [next(ids) for _ in self.keys]
                results[index] = self._joined(document, texts[index], mine)
        return results

    def _joined(
        self, document: RawDocument, texts: list[str], ids: list[list[int] | str]
    ) -> Encoded:
        """The arrays of one document."""
        kept = [each for each in ids if not isinstance(each, str)]
        if len(kept) < len(ids):
            fault = next(each for each in ids if isinstance(each, str))
            return document.error("not_tokenized", fault)
        if not all(kept):
            # Begin and end ids alone are not a document.
            return document.error("empty", "empty: its text yields no token")
        self.count_losses(texts, kept)
        for stream, text in zip(self.streams, texts, strict=True):
            self.text_bytes[stream.name] += num_utf8_bytes(text)
        begin = self.tokenizer.begin
        return [numpy.array([*begin, *each, *self._end], self._dtype) for each in kept]


def tokenize_batch(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int] | str]:
    """Ids of each text, or the tokenizer's error message."""
    try:
        return list(tokenizer.tokenize_batch(texts))
    except DataError:
        return [_tokenize(tokenizer, text) for text in texts]


def describe_losses(losses: Mapping[str, int]) -> str:
    """A sentence about what ids do not give back, from `Encoder.losses`."""
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(losses.items()) if kind != "texts")
    return f"{losses['texts']} texts have characters that the tokenizer does not give back: {kinds}"


def num_utf8_bytes(text: str) -> int:
    """Bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode())


def token_dtype(vocab_size: int) -> type[numpy.number]:
    """Storage type of ids, as megatron-core's DType.optimal_dtype chooses it."""
    return numpy.uint16 if vocab_size < 65500 else numpy.int32


def _tokenize(tokenizer: Tokenizer, text: str) -> list[int] | str:
    try:
        return tokenizer.tokenize(text)
    except DataError as error:
        return str(error).rstrip(".")
