"""Encodes documents into token ids, inside a worker.

An encoder turns each document of a batch into one array per *stream*. Each stream becomes a
dataset. Texts have one stream per JSON key; conversations (conversations.py) have two, ids and loss
mask.
"""

import abc
import dataclasses
from collections.abc import Sequence

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

    @abc.abstractmethod
    def encode(self, documents: Sequence[RawDocument]) -> list[Encoded]:
        """Encode each document: its arrays, or the reason for its rejection, in order."""


class TextEncoder(Encoder):
    """Encodes the text under each key, optionally followed by the end id."""

    def __init__(self, tokenizer: Tokenizer, keys: Sequence[str], append_eod: bool) -> None:
        self.tokenizer = tokenizer
        self._keys = keys
        self._end = [tokenizer.eod] if append_eod else []
        self._dtype = token_dtype(tokenizer.vocab_size)
        self.streams = [Stream(f"{key}_document", self._dtype) for key in keys]

    def encode(self, documents: Sequence[RawDocument]) -> list[Encoded]:
        """See Encoder."""
        results: list[Encoded] = []
        texts: list[str] = []
        for document in documents:
            try:
                texts += document.texts(self._keys)
                results.append([])
            except DocumentError as error:
                results.append(error)
        ids = iter(tokenize_batch(self.tokenizer, texts))
        for index, (document, result) in enumerate(zip(documents, results, strict=True)):
            if isinstance(result, DocumentError):
                continue
            mine = [next(ids) for _ in self._keys]
            fault = next((each for each in mine if isinstance(each, str)), None)
            if fault is not None:
                results[index] = document.error("not_tokenized", fault)
            elif not all(mine):
                # An end id alone is not a document.
                results[index] = document.error("empty", "empty: its text yields no token")
            else:
                results[index] = [numpy.array([*each, *self._end], self._dtype) for each in mine]
        return results


def tokenize_batch(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int] | str]:
    """Ids of each text, or the tokenizer's error message."""
    try:
        return list(tokenizer.tokenize_batch(texts))
    except DataError:
        return [_tokenize(tokenizer, text) for text in texts]


def token_dtype(vocab_size: int) -> type[numpy.number]:
    """Storage type of ids, as megatron-core's DType.optimal_dtype chooses it."""
    return numpy.uint16 if vocab_size < 65500 else numpy.int32


def _tokenize(tokenizer: Tokenizer, text: str) -> list[int] | str:
    try:
        return tokenizer.tokenize(text)
    except DataError as error:
        return str(error).rstrip(".")
