"""Strict checks of an indexed dataset's files, before megatron-core maps them into memory.

The format is Megatron-LM's. PREFIX.idx: magic (9 bytes), version (uint64), dtype code (uint8),
number of sequences n (uint64), number of document boundaries m (uint64), lengths (int32 [n]), byte
offsets (int64 [n]), document boundaries (int64 [m], from 0 to n). PREFIX.bin: the token ids.
"""

import dataclasses
import os
import struct
from pathlib import Path

import numpy

from megatron_ponder.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
TOKEN_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 8: 2}
"""Bytes per id by dtype code; the floating-point codes 6 and 7 cannot hold ids."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexedDatasetSize:
    """What a dataset holds."""

    num_documents: int
    num_tokens: int


def check_indexed_dataset(prefix: str) -> IndexedDatasetSize:
    """Check PREFIX.idx and PREFIX.bin against each other.

    Raises:
        DataError: a file is missing, truncated, has trailing bytes, or contradicts the other.
    """
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for file in (index, data):
        if not file.is_file():
            raise DataError(
                f"{file}: no such file. A dataset is named by its prefix, without .bin or .idx; "
                "tools/preprocess_data.py writes one."
            )
    token_bytes, num_sequences, num_boundaries = _read_header(index)
    expected = HEADER.size + 12 * num_sequences + 8 * num_boundaries
    if index.stat().st_size != expected:
        raise DataError(
            f"{index}: {index.stat().st_size} bytes, but its header says {expected}. The file is "
            "truncated or damaged; preprocess the corpus again."
        )
    content = numpy.memmap(index, mode="r", dtype=numpy.uint8, offset=HEADER.size)
    lengths = content[: 4 * num_sequences].view("<i4")
    offsets = content[4 * num_sequences : 12 * num_sequences].view("<i8")
    boundaries = content[12 * num_sequences :].view("<i8")
    ends = numpy.cumsum(lengths, dtype=numpy.int64) * token_bytes
    if (lengths <= 0).any() or offsets[0] != 0 or (offsets[1:] != ends[:-1]).any():
        raise DataError(f"{index}: lengths and offsets contradict each other; the file is damaged.")
    is_whole = boundaries[0] == 0 and boundaries[-1] == num_sequences
    if not is_whole or (numpy.diff(boundaries) <= 0).any():
        raise DataError(f"{index}: its document boundaries are damaged.")
    if os.path.getsize(data) != ends[-1]:
        raise DataError(
            f"{data}: {os.path.getsize(data)} bytes, but {index.name} describes {ends[-1]}. One of "
            "them is truncated or belongs to another dataset; preprocess the corpus again."
        )
    return IndexedDatasetSize(
        num_documents=num_boundaries - 1, num_tokens=int(ends[-1]) // token_bytes
    )


def _read_header(index: Path) -> tuple[int, int, int]:
    """Bytes per token, sequences, and document boundaries."""
    with open(index, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise DataError(f"{index}: not the index of an indexed dataset, or truncated.")
    _, version, code, num_sequences, num_boundaries = HEADER.unpack(header)
    if version != VERSION or code not in TOKEN_BYTES:
        raise DataError(f"{index}: version {version} with dtype code {code} is not supported.")
    if num_sequences == 0 or num_boundaries < 2:
        raise DataError(f"{index}: the dataset is empty.")
    return TOKEN_BYTES[code], num_sequences, num_boundaries
