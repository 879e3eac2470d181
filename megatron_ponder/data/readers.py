"""Streams the documents of JSON Lines, plain text and Parquet files, in order.

Files are cut into segments, and segments are grouped into chunks. A chunk is the unit of work of a
worker, and the unit that a resumed run reuses. Chunk boundaries depend only on the content and on
`chunk_bytes`. Memory is bounded by the longest accepted document, whatever the size of a file.
"""

import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet

from megatron_ponder.data.documents import DocumentError, RawDocument, Row, Segment
from megatron_ponder.data.sources import MAGIC, STDIN, Source

InputFormat = Literal["auto", "jsonl", "text", "parquet"]
SUFFIXES = {
    "jsonl": (".jsonl", ".json", ".ndjson"),
    "text": (".txt", ".text", ".md", ".rst"),
    "parquet": (".parquet",),
}
DEFAULT_MAX_DOCUMENT_BYTES = 64 << 20
ROWS_AT_ONCE = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How to read files."""

    input_format: InputFormat = "auto"
    """auto: by the suffix of each file."""
    split_paragraphs: bool = False
    """Plain text: one document per block between blank lines instead of one per file."""
    keys: tuple[str, ...] = ("text",)
    """Columns of tables to read."""
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES
    """Longer documents are dropped."""


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive segments that one worker tokenizes."""

    index: int
    segments: list[Segment]
    num_stored_bytes: int
    """Stored bytes read since the previous chunk, for the progress bar."""

    def digest(self) -> str:
        """SHA-256 of everything that determines its documents."""
        digest = hashlib.sha256()
        for segment in self.segments:
            segment.update(digest)
        return digest.hexdigest()

    def documents(self, max_document_bytes: int) -> Iterator[RawDocument | DocumentError]:
        """Its documents in order, and an error for each that is too long."""
        for segment in self.segments:
            yield from segment.documents(max_document_bytes)


def read_chunks(
    sources: Sequence[Source], options: ReadOptions, chunk_bytes: int
) -> Iterator[Chunk]:
    """All files, in chunks of `chunk_bytes` plus at most one segment.

    Raises:
        DataError: a file cannot be read or is damaged, or its suffix is unknown to auto.
    """
    segments: list[Segment] = []
    size = index = stored_before = 0
    for source in sources:
        for segment in read_segments(source, options):
            segments.append(segment)
            size += segment.num_bytes
            if size >= chunk_bytes:
                stored = sum(each.num_bytes for each in sources)
                yield Chunk(index, segments, stored - stored_before)
                segments, size, index, stored_before = [], 0, index + 1, stored
    if segments:
        yield Chunk(index, segments, sum(each.num_bytes for each in sources) - stored_before)


def read_documents(
    files: Sequence[Path],
    input_format: InputFormat = "auto",
    split_paragraphs: bool = False,
    keys: tuple[str, ...] = ("text",),
) -> Iterator[RawDocument]:
    """All documents of all files, in order; the first invalid one is an error.

    Raises:
        DataError: a file cannot be read, its suffix is unknown to auto, or a document is too long.
    """
    options = ReadOptions(input_format=input_format, split_paragraphs=split_paragraphs, keys=keys)
    for file in files:
        for segment in read_segments(Source(file), options):
            for document in segment.documents(options.max_document_bytes):
                if isinstance(document, DocumentError):
                    raise document
                yield document


def read_segments(source: Source, options: ReadOptions) -> Iterator[Segment]:
    """The segments of one file.

    Raises:
        DataError: the file cannot be read or is damaged, or its suffix is unknown to auto.
    """
    match format_of(source, options.input_format):
        case "parquet":
            yield from _read_table(source, options.keys)
        case "jsonl":
            pieces = source.text_pieces(is_json_lines=True)
            yield from _read_lines(source, pieces, options.max_document_bytes)
        case "text" if options.split_paragraphs:
            yield from _read_paragraphs(source, options.max_document_bytes)
        case _:
            yield _read_whole(source, options.max_document_bytes)


def format_of(source: Source, input_format: InputFormat) -> str:
    """The format of one file: `input_format`, or with auto the format of its suffix.

    Raises:
        DataError: the suffix is unknown, or standard input is to be read as Parquet.
    """
    if source.path == STDIN:
        if input_format == "parquet":
            raise source.error("Parquet cannot be read from standard input; give a file")
        return "jsonl" if input_format == "auto" else input_format
    if input_format != "auto":
        return input_format
    for name, suffixes in SUFFIXES.items():
        if source.suffix in suffixes:
            return name
    known = ", ".join(suffix for suffixes in SUFFIXES.values() for suffix in suffixes)
    raise source.error(
        f"cannot tell its format from its name; give --input-format jsonl, text or parquet (known "
        f"suffixes: {known}, each optionally followed by {', '.join(MAGIC)})"
    )


def _read_lines(
    source: Source, pieces: Iterator[bytes], max_document_bytes: int
) -> Iterator[Segment]:
    """Blocks of whole lines. A line over the limit is dropped and becomes a segment too_long."""
    begun: list[bytes] = []  # start of a line that continues in the next piece
    size = 0
    line = 1
    is_dropped = False
    for piece in pieces:
        end = piece.rfind(b"\n") + 1
        if end:
            if is_dropped:
                yield Segment("too_long", source.name, line, b"")
                line += 1
                block = piece[piece.find(b"\n") + 1 : end]
            else:
                block = b"".join([*begun, piece[:end]])
            if block:
                yield Segment("lines", source.name, line, block)
            line += block.count(b"\n")
            begun, size, is_dropped = [], 0, False
        begun.append(piece[end:])
        size += len(piece) - end
        if size > max_document_bytes:
            begun, is_dropped = [], True
    if is_dropped:
        yield Segment("too_long", source.name, line, b"")
    elif size:
        yield Segment("lines", source.name, line, b"".join(begun))


def _read_paragraphs(source: Source, max_document_bytes: int) -> Iterator[Segment]:
    """One document per block of non-blank lines."""
    block: list[bytes] = []
    size = first = 0
    is_dropped = False

    def ended() -> Iterator[Segment]:
        if is_dropped:
            yield Segment("too_long", source.name, first, b"")
        elif block:
            yield Segment("text", source.name, first, b"".join(block))

    for segment in _read_lines(source, source.text_pieces(), max_document_bytes):
        if segment.kind == "too_long":
            is_dropped, first = True, first or segment.first_line
            continue
        assert isinstance(segment.content, bytes)
        for number, line in enumerate(io.BytesIO(segment.content), segment.first_line):
            if not line.strip():
                yield from ended()
                block, size, first, is_dropped = [], 0, 0, False
                continue
            first = first or number
            size += len(line)
            is_dropped = is_dropped or size > max_document_bytes
            if is_dropped:
                block.clear()
            else:
                block.append(line)
    yield from ended()


def _read_whole(source: Source, max_document_bytes: int) -> Segment:
    """The file as one document. Over the limit it is read only for its digest and dropped."""
    kept: list[bytes] = []
    size = 0
    for piece in source.text_pieces():
        size += len(piece)
        if size > max_document_bytes:
            kept.clear()
        else:
            kept.append(piece)
    if size > max_document_bytes:
        return Segment("too_long", source.name, 1, b"")
    return Segment("text", source.name, 1, b"".join(kept))


def _read_table(source: Source, keys: tuple[str, ...]) -> Iterator[Segment]:
    """Rows of a Parquet file, a few at a time."""
    source.hash_all()
    try:
        with contextlib.closing(pyarrow.parquet.ParquetFile(source.path)) as table:
            names = table.schema_arrow.names
            present = [key for key in keys if key in names]
            for key in present:
                if names.count(key) > 1:
                    raise source.error(f"has {names.count(key)} columns named {key}; rename them")
            num_rows = table.metadata.num_rows
            if not present:
                yield from _rows_without_text(source, num_rows)
                return
            line = 1
            for batch in table.iter_batches(batch_size=ROWS_AT_ONCE, columns=present):
                columns = [_text_of(batch.column(key)) for key in present]
                rows = [tuple(zip(present, row, strict=True)) for row in zip(*columns, strict=True)]
                yield Segment("rows", source.name, line, rows)
                line += len(rows)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # also of column names
        raise source.error(
            f"damaged or not a Parquet file ({error}); copy or download it again"
        ) from None
    if line - 1 != num_rows:
        raise source.error(
            f"has {line - 1} rows, but its metadata says {num_rows}; copy or download it again"
        )


def _rows_without_text(source: Source, num_rows: int) -> Iterator[Segment]:
    """Empty rows of a table that has none of the columns; each is rejected later."""
    for start in range(0, num_rows, ROWS_AT_ONCE):
        rows: list[Row] = [()] * min(ROWS_AT_ONCE, num_rows - start)
        yield Segment("rows", source.name, start + 1, rows)


def _text_of(column: pyarrow.Array) -> list[Any]:
    """A column's values as stored in `Row`."""
    if isinstance(column, pyarrow.ExtensionArray):  # for example arrow.json
        column = column.storage
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if any(is_text(kind) for is_text in _TEXT_TYPES):
        values: list[Any] = column.cast(pyarrow.large_binary()).to_pylist()
        return values
    return [False if is_there else None for is_there in column.is_valid().to_pylist()]


_TEXT_TYPES = (
    pyarrow.types.is_string,
    pyarrow.types.is_large_string,
    pyarrow.types.is_string_view,
    pyarrow.types.is_binary,
    pyarrow.types.is_large_binary,
    pyarrow.types.is_binary_view,
)
