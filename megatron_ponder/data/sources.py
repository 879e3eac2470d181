"""Finds the files of a corpus and streams their bytes, hashed and decompressed.

Memory depends neither on the size of a file nor on its decompressed size. A compressed file that is
truncated or has trailing data is refused, because the number of lost documents is unknown. Not
covered: parsing (readers.py).
"""

import bz2
import contextlib
import dataclasses
import glob
import hashlib
import io
import lzma
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow

from megatron_ponder.errors import DataError

STDIN = Path("-")
PIECE_BYTES = 1 << 20
"""Bytes read, or decompressed, at once."""
MAGIC = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".bz2": b"BZh", ".xz": b"\xfd7zXZ\0"}
"""Suffixes of compressed files and their first bytes."""


@dataclasses.dataclass
class Source:
    """A file or standard input, with the size and hash of what has been read."""

    path: Path
    num_bytes: int = 0
    """Stored bytes read so far."""
    digest: "hashlib._Hash" = dataclasses.field(default_factory=hashlib.sha256)
    """SHA-256 of the bytes read so far."""

    @property
    def name(self) -> str:
        """Name in messages."""
        return "standard input" if self.path == STDIN else str(self.path)

    @property
    def suffix(self) -> str:
        """Suffix of the format, without that of the compression; lower case."""
        suffix = self.path.suffix.lower()
        return Path(self.path.stem).suffix.lower() if suffix in MAGIC else suffix

    def pieces(self) -> Iterator[bytes]:
        """The decompressed content, in pieces whose boundaries depend only on the content.

        Raises:
            DataError: the file cannot be read, or its compression is damaged.
        """
        raw = self._raw_pieces()
        if self.path != STDIN:
            suffix = self.path.suffix.lower()
            yield from self._decompressed(raw, suffix) if suffix in MAGIC else raw
            return
        first = next(raw, b"")
        suffix = next((s for s, magic in MAGIC.items() if first.startswith(magic)), "")
        chained = _chain(first, raw)
        yield from self._decompressed(chained, suffix) if suffix else chained

    def hash_all(self) -> None:
        """Read the file only for its size and digest."""
        for _ in self._raw_pieces():
            pass

    def error(self, reason: str) -> DataError:
        """A DataError about the file as a whole."""
        return DataError(f"{self.name}: {reason}.")

    def _raw_pieces(self) -> Iterator[bytes]:
        """The stored bytes, counted and hashed."""
        try:
            with self._open() as file:
                while piece := file.read(PIECE_BYTES):
                    self.num_bytes += len(piece)
                    self.digest.update(piece)
                    yield piece
        except OSError as error:
            raise self.error(f"cannot be read: {error.strerror}") from None

    def _open(self) -> contextlib.AbstractContextManager[IO[bytes]]:
        if self.path == STDIN:
            return contextlib.nullcontext(sys.stdin.buffer)
        return self.path.open("rb")

    def _decompressed(self, raw: Iterator[bytes], suffix: str) -> Iterator[bytes]:
        """The content of one or more concatenated compressed streams."""
        name = suffix[1:]
        try:
            yield from _unpack_zstd(raw) if suffix == ".zst" else _unpack(raw, suffix)
        except EOFError:
            raise self.error(f"its {name} data ends early; copy or download it again") from None
        except (zlib.error, lzma.LZMAError, OSError) as error:
            raise self.error(f"damaged {name} data ({error}); copy or download it again") from None


def _unpack_zstd(raw: Iterator[bytes]) -> Iterator[bytes]:
    """Decompress with pyarrow, which distinguishes a truncated stream from a complete one."""
    file = _PiecesFile(raw)
    if not file.peek():
        raise EOFError
    with pyarrow.CompressedInputStream(file, "zstd") as stream:
        yield from iter(lambda: stream.read(PIECE_BYTES), b"")


def _unpack(raw: Iterator[bytes], suffix: str) -> Iterator[bytes]:
    """Decompress with Python's modules, which all have `eof` and `unused_data`."""
    decompressor: Any = None
    is_first = True
    for piece in raw:
        while piece:
            if decompressor is None:
                if not is_first and suffix == ".gz" and not (piece := piece.lstrip(b"\0")):
                    break  # gzip allows trailing zeros, for tapes
                decompressor = DECOMPRESSORS[suffix]()
            is_first = False
            yield from _outputs(decompressor, piece)
            piece = decompressor.unused_data if decompressor.eof else b""
            if decompressor.eof:
                decompressor = None
    if decompressor is not None or is_first:
        raise EOFError


class _PiecesFile(io.RawIOBase):
    """A readable file made of pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def readable(self) -> bool:
        """Always true."""
        return True

    def peek(self) -> bytes:
        """The next bytes; empty at the end."""
        self._rest = self._rest or next(self._pieces, b"")
        return self._rest

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes."""
        piece = self.peek()
        size = len(piece) if size < 0 else size
        self._rest = piece[size:]
        return piece[:size]


DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=31),
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lambda: lzma.LZMADecompressor(format=lzma.FORMAT_XZ),
}


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Expand folders (every file below, sorted) and globs into files, in order; "-" is stdin.

    Raises:
        DataError: an entry matches no file, or standard input is given twice.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path == STDIN:
            found = [STDIN]
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file())
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
            found = [p for p in found if p.is_file()]
        if not found:
            raise DataError(
                f"--input {pattern}: no such file, and nothing matches it as a pattern."
            )
        files += found
    if files.count(STDIN) > 1:
        raise DataError("--input - can be given once only: standard input is read once.")
    return files


def total_bytes(files: Sequence[Path]) -> int | None:
    """Stored bytes of all files; None with standard input, whose size is unknown."""
    if STDIN in files:
        return None
    return sum(file.stat().st_size for file in files)


def _outputs(decompressor: Any, data: bytes) -> Iterator[bytes]:
    """Decompress `data` into pieces of bounded size."""
    while True:
        output = decompressor.decompress(data, PIECE_BYTES)
        if output:
            yield output
        # zlib returns unprocessed input; bz2 and lzma buffer it and report that.
        data = getattr(decompressor, "unconsumed_tail", b"")
        is_waiting = getattr(decompressor, "needs_input", len(output) < PIECE_BYTES and not data)
        if decompressor.eof or is_waiting:
            return


def _chain(first: bytes, rest: Iterator[bytes]) -> Iterator[bytes]:
    """Put a piece back in front of the rest."""
    if first:
        yield first
    yield from rest
