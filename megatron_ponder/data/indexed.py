"""Writes the files of an indexed dataset, and checks them before megatron-core maps them.

The format is Megatron-LM's. PREFIX.idx: magic (9 bytes), version (uint64), dtype code (uint8),
number of sequences n (uint64), number of document boundaries m (uint64), lengths (int32 [n]), byte
offsets (int64 [n]), document boundaries (int64 [m], from 0 to n; equal ones enclose an empty
document). PREFIX.bin: the token ids.
Files are processed in pieces, so an index of billions of documents needs little memory.
"""

import dataclasses
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy

from megatron_ponder.data.missing_dataset import missing_dataset
from megatron_ponder.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[numpy.number]] = {
    1: numpy.uint8,
    2: numpy.int8,
    3: numpy.int16,
    4: numpy.int32,
    5: numpy.int64,
    8: numpy.uint16,
}
"""Types of ids by code. The floating-point codes 6 and 7 are not valid for ids."""
CODES = {dtype: code for code, dtype in DTYPES.items()}
PIECE_ITEMS = 1 << 20
"""Entries of an index that are processed at once."""
DOCUMENTS_LOOKED_AT = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexedDatasetSize:
    """Size of a dataset."""

    num_documents: int
    num_sequences: int
    """Parts of documents; what megatron-core splits and shuffles. Usually one per document."""
    num_tokens: int


@dataclasses.dataclass(frozen=True)
class IndexFile:
    """The arrays of a .idx, mapped into memory."""

    dtype: type[numpy.number]
    lengths: numpy.ndarray
    offsets: numpy.ndarray
    boundaries: numpy.ndarray


class IndexPart(Protocol):
    """Consecutive sequences of an index to be written."""

    @property
    def num_sequences(self) -> int:
        """Number of sequences."""

    @property
    def num_documents(self) -> int:
        """Number of documents."""

    def lengths(self) -> numpy.ndarray:
        """Tokens of each sequence, int32."""

    def ends(self) -> numpy.ndarray:
        """Index after the last sequence of each document, counted from the start of the part."""


def write_index(path: Path, dtype: type[numpy.number], parts: Sequence[IndexPart]) -> None:
    """Write a .idx as megatron-core's IndexedDatasetBuilder does."""
    num_sequences = sum(part.num_sequences for part in parts)
    num_documents = sum(part.num_documents for part in parts)
    token_bytes = numpy.dtype(dtype).itemsize
    with path.open("wb") as file:
        code = CODES[dtype]
        file.write(HEADER.pack(MAGIC, VERSION, code, num_sequences, num_documents + 1))
        for part in parts:
            for lengths in _pieces(part.lengths()):
                file.write(lengths.astype("<i4").tobytes())
        offset = 0
        for part in parts:
            for lengths in _pieces(part.lengths()):
                ends = numpy.cumsum(lengths, dtype="<i8") * token_bytes + offset
                file.write(numpy.concatenate(([offset], ends[:-1])).astype("<i8").tobytes())
                offset = int(ends[-1])
        file.write(numpy.zeros(1, "<i8").tobytes())
        num_before = 0
        for part in parts:
            for boundaries in _pieces(part.ends()):
                file.write((boundaries + num_before).astype("<i8").tobytes())
            num_before += part.num_sequences


def open_index(index: Path) -> IndexFile:
    """Map a .idx into memory.

    Raises:
        DataError: the file is missing, is not an index, or its size contradicts its header.
    """
    dtype, num_sequences, num_boundaries = _read_header(index)
    expected = HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if index.stat().st_size != expected:
        raise DataError(
            f"{index}: has {index.stat().st_size} bytes, but its header says {expected}. The "
            "file is truncated or damaged; preprocess the corpus again."
        )
    content = numpy.memmap(index, mode="r", dtype=numpy.uint8, offset=HEADER.size)
    return IndexFile(
        dtype=dtype,
        lengths=content[: 4 * num_sequences].view("<i4"),
        offsets=content[4 * num_sequences : 12 * num_sequences].view("<i8"),
        boundaries=content[12 * num_sequences :].view("<i8"),
    )


def check_indexed_dataset(prefix: str) -> IndexedDatasetSize:
    """Check PREFIX.idx and PREFIX.bin against each other.

    Raises:
        DataError: a file is missing, truncated, has trailing bytes, or contradicts the other.
    """
    index, data = index_file(prefix), data_file(prefix)
    if not index.is_file() or not data.is_file():
        raise missing_dataset(prefix)
    content = open_index(index)
    token_bytes = numpy.dtype(content.dtype).itemsize
    end = 0
    for lengths, offsets in zip(_pieces(content.lengths), _pieces(content.offsets), strict=True):
        ends = numpy.cumsum(lengths, dtype=numpy.int64) * token_bytes + end
        if (lengths < 0).any() or offsets[0] != end or (offsets[1:] != ends[:-1]).any():
            raise DataError(
                f"{index}: lengths and offsets contradict each other. The file is damaged; "
                "preprocess the corpus again."
            )
        end = int(ends[-1])
    boundaries = content.boundaries
    is_whole = boundaries[0] == 0 and boundaries[-1] == len(content.lengths)
    steps = (numpy.diff(each) for each in _pieces(boundaries, overlap=1))
    if not is_whole or any((step < 0).any() for step in steps):
        raise DataError(
            f"{index}: invalid document boundaries. The file is damaged; preprocess the corpus "
            "again."
        )
    if os.path.getsize(data) != end:
        raise DataError(
            f"{data}: has {os.path.getsize(data)} bytes, but {index.name} describes {end}. One of "
            "them is truncated or belongs to another dataset; preprocess the corpus again."
        )
    if end == 0:
        raise _empty(index)
    return IndexedDatasetSize(
        num_documents=len(boundaries) - 1,
        num_sequences=len(content.lengths),
        num_tokens=end // token_bytes,
    )


def count_unended(prefix: str, eod: int) -> tuple[int, int]:
    """How many documents do not end with the end id, and of how many; a sample over the dataset.

    Args:
        prefix: a dataset that has been checked.
        eod: the end id.
    """
    index = open_index(index_file(prefix))
    number = len(index.boundaries) - 1
    chosen = numpy.unique(numpy.linspace(0, number - 1, DOCUMENTS_LOOKED_AT).astype(numpy.int64))
    chosen = chosen[index.boundaries[chosen] < index.boundaries[chosen + 1]]  # not empty
    last = index.boundaries[chosen + 1] - 1
    places = index.offsets[last] // numpy.dtype(index.dtype).itemsize + index.lengths[last] - 1
    ids = map_ids(prefix, index.dtype)[places[index.lengths[last] > 0]]
    return int((ids != eod).sum()), len(ids)


def index_file(prefix: str | Path) -> Path:
    """PREFIX.idx."""
    return Path(f"{prefix}.idx")


def data_file(prefix: str | Path) -> Path:
    """PREFIX.bin."""
    return Path(f"{prefix}.bin")


def map_ids(prefix: str, dtype: type[numpy.number]) -> numpy.ndarray:
    """All ids of PREFIX.bin, mapped into memory."""
    return numpy.memmap(data_file(prefix), mode="r", dtype=numpy.dtype(dtype).newbyteorder("<"))


def _pieces(array: numpy.ndarray, overlap: int = 0) -> Iterator[Any]:
    """An array in pieces; each starts with the last `overlap` entries of the previous one."""
    for start in range(0, len(array), PIECE_ITEMS):
        yield array[max(start - overlap, 0) : start + PIECE_ITEMS]


def _read_header(index: Path) -> tuple[type[numpy.number], int, int]:
    """Type of the ids, number of sequences, and number of document boundaries."""
    with open(index, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise DataError(
            f"{index}: not the index of an indexed dataset, or truncated; preprocess the corpus "
            "again."
        )
    _, version, code, num_sequences, num_boundaries = HEADER.unpack(header)
    if version != VERSION or code not in DTYPES:
        raise DataError(
            f"{index}: version {version} with dtype code {code} is not supported. Supported: "
            f"version {VERSION} with dtype code {', '.join(map(str, DTYPES))}."
        )
    if num_sequences == 0 or num_boundaries < 2:
        raise _empty(index)
    return DTYPES[code], num_sequences, num_boundaries


def _empty(index: Path) -> DataError:
    return DataError(f"{index}: the dataset is empty; preprocess a corpus that has text.")
