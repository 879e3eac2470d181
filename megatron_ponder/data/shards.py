"""Shards: the tokenized documents of one chunk, written by a worker and reused by a resumed run.

    magic, length of the header (uint64), header (JSON), then for each stream
    the lengths of the documents (int32) and their concatenated ids

The header holds the SHA-256 of the chunk and a checksum of the data after it. So a shard that is
truncated or belongs to other input is never reused. Shards are written to a temporary name and
renamed.
"""

import dataclasses
import json
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy

from megatron_ponder.data.documents import DocumentError, RawDocument
from megatron_ponder.data.encoding import Encoder, Stream
from megatron_ponder.data.readers import Chunk
from megatron_ponder.errors import DataError

MAGIC = b"PONDERSHARD1"
HEADER = struct.Struct("<12sQ")
BATCH_BYTES = 1 << 19
"""Bytes of text tokenized at once."""
COPY_BYTES = 1 << 22
LONGEST_DOCUMENT_TOKENS = (1 << 31) - 1
"""Lengths are int32 in the format."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardHeader:
    """Header of a shard."""

    chunk_sha256: str
    num_read: int
    num_written: int
    num_text_bytes: int
    rejected: list[dict[str, Any]]
    """Lines for PREFIX.rejected.jsonl. read = written + rejected."""
    num_tokens: dict[str, int]
    """Tokens by stream."""
    losses: dict[str, int]
    """What the ids do not give back (Encoder.losses)."""
    text_bytes: dict[str, int]
    """UTF-8 bytes of the texts written, by stream."""
    num_repeated_keys: int
    """Documents that state a key twice."""
    first_repeated_key: str | None
    """File and line of the first of them."""
    checksum: int
    """CRC-32 of everything after the header."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """A complete shard on disk."""

    path: Path
    header: ShardHeader
    streams: Sequence[Stream]
    begin: int
    """Offset of the first stream in the file."""

    @property
    def num_documents(self) -> int:
        """Documents in each stream."""
        return self.header.num_written

    def lengths(self, stream: Stream) -> numpy.ndarray:
        """Tokens of each document, int32."""
        with self.path.open("rb") as file:
            file.seek(self._offset(list(self.streams).index(stream)))
            return numpy.fromfile(file, "<i4", self.num_documents)

    def pieces(self, stream: Stream) -> Iterator[bytes]:
        """The stored ids, in pieces."""
        left = self.header.num_tokens[stream.name] * numpy.dtype(stream.dtype).itemsize
        with self.path.open("rb") as file:
            file.seek(self._offset(list(self.streams).index(stream)) + 4 * self.num_documents)
            while left:
                piece = file.read(min(COPY_BYTES, left))
                if not piece:
                    raise DataError(f"{self.path}: ends early. Repeat the same command.")
                left -= len(piece)
                yield piece

    def _offset(self, count: int) -> int:
        """Offset in the file at which the first `count` streams end."""
        offset = self.begin
        for stream in self.streams[:count]:
            num_tokens = self.header.num_tokens[stream.name]
            offset += 4 * self.num_documents + num_tokens * numpy.dtype(stream.dtype).itemsize
        return offset

    def is_whole(self) -> bool:
        """Whether size and checksum match the header."""
        if self.path.stat().st_size != self._offset(len(self.streams)):
            return False
        checksum = 0
        with self.path.open("rb") as file:
            file.seek(self.begin)
            while piece := file.read(COPY_BYTES):
                checksum = zlib.crc32(piece, checksum)
        return checksum == self.header.checksum


def write_shard(path: Path, chunk: Chunk, encoder: Encoder, max_document_bytes: int) -> ShardHeader:
    """Tokenize a chunk into a shard.

    Raises:
        DataError: a document has more tokens than the format can hold.
    """
    num_read = num_text_bytes = 0
    repeated_keys: list[str] = []
    encoder.losses.clear()
    encoder.text_bytes.clear()
    rejected: list[dict[str, Any]] = []
    columns: list[list[numpy.ndarray]] = [[] for _ in encoder.streams]
    for batch in _batches(chunk.documents(max_document_bytes)):
        num_read += len(batch)
        documents = [document for document in batch if isinstance(document, RawDocument)]
        encoded = iter(encoder.encode(documents))
        for document in batch:
            result = document if isinstance(document, DocumentError) else next(encoded)
            if isinstance(result, DocumentError):
                rejected.append(result.as_record())
                continue
            assert isinstance(document, RawDocument)
            num_text_bytes += _num_bytes(document)
            if document.repeats_key(encoder.keys):
                repeated_keys.append(f"{document.file}:{document.line}")
            for column, array in zip(columns, result, strict=True):
                column.append(array)
    sections: list[numpy.ndarray] = []
    for stream, column in zip(encoder.streams, columns, strict=True):
        lengths = numpy.array([len(array) for array in column], "<i8")
        if lengths.size and lengths.max() > LONGEST_DOCUMENT_TOKENS:
            raise DataError(
                f"a document has {lengths.max()} tokens, but the format allows only "
                f"{LONGEST_DOCUMENT_TOKENS}; lower --max-document-bytes to reject it."
            )
        data = numpy.concatenate(column) if column else numpy.empty(0, stream.dtype)
        sections += [lengths.astype("<i4"), data]
    checksum = 0
    for section in sections:
        checksum = zlib.crc32(section.tobytes(), checksum)
    header = ShardHeader(
        chunk_sha256=chunk.digest(),
        num_read=num_read,
        num_written=num_read - len(rejected),
        num_text_bytes=num_text_bytes,
        rejected=rejected,
        num_tokens={s.name: sections[2 * i + 1].size for i, s in enumerate(encoder.streams)},
        losses=dict(encoder.losses),
        text_bytes=dict(encoder.text_bytes),
        num_repeated_keys=len(repeated_keys),
        first_repeated_key=repeated_keys[0] if repeated_keys else None,
        checksum=checksum,
    )
    content = json.dumps(dataclasses.asdict(header)).encode()
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    with unfinished.open("wb") as file:
        file.write(HEADER.pack(MAGIC, len(content)))
        file.write(content)
        for section in sections:
            file.write(section.tobytes())
    os.replace(unfinished, path)
    return header


def read_shard(path: Path, streams: Sequence[Stream]) -> Shard | None:
    """The shard at `path`; None if it is missing or damaged."""
    try:
        with path.open("rb") as file:
            magic, size = HEADER.unpack(file.read(HEADER.size))
            if magic != MAGIC or size > path.stat().st_size:
                return None
            header = ShardHeader(**json.loads(file.read(size)))
        shard = Shard(path, header, streams, HEADER.size + size)
        return shard if shard.is_whole() else None
    except (OSError, struct.error, ValueError, TypeError, KeyError):
        return None


def _batches(
    documents: Iterator[RawDocument | DocumentError],
) -> Iterator[list[RawDocument | DocumentError]]:
    """Documents in groups of about BATCH_BYTES."""
    batch: list[RawDocument | DocumentError] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += 0 if isinstance(document, DocumentError) else _num_bytes(document)
        if size >= BATCH_BYTES or len(batch) >= 4096:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _num_bytes(document: RawDocument) -> int:
    """Uncompressed bytes of a document."""
    if isinstance(document.content, bytes):
        return len(document.content)
    return sum(len(value) for _, value in document.content if isinstance(value, bytes))
