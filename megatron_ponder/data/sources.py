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
import itertools
import logging
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow

from megatron_ponder.errors import DataError

logger = logging.getLogger(__name__)

STDIN = Path("-")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PIECE_BYTES = 1 << 20
"""Bytes read, or decompressed, at once."""
MAGIC = {
    ".gz": re.compile(rb"\x1f\x8b"),
    ".zst": re.compile(rb"\x28\xb5\x2f\xfd"),
    ".bz2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    ".xz": re.compile(rb"\xfd7zXZ\0"),
}
"""Suffixes of compressed files and their first bytes."""
HEAD_BYTES = 64
"""First bytes of a file, by which it is recognised."""
NAMES_SHOWN = 20

_NOT_TEXT = (
    *(
        (magic, f"{end[1:]} data", f"give its name the suffix {end}")
        for end, magic in MAGIC.items()
    ),
    (re.compile(rb"PAR1\x15"), "a Parquet table", "give --input-format parquet"),
    (re.compile(rb"PK\x03\x04"), "a zip archive", "unpack it"),
    (re.compile(rb"\xff\xfe\0\0|\0\0\xfe\xff"), "UTF-32", "convert it: iconv -f UTF-32 -t UTF-8"),
    (
        re.compile(rb"\xff\xfe|\xfe\xff|([^\0]\0){4}|(\0[^\0]){4}"),
        "UTF-16",
        "convert it: iconv -f UTF-16 -t UTF-8",
    ),
)
_NOT_LINES = (
    (re.compile(rb"\s*\["), "a JSON array", "write one object per line: jq -c '.[]'"),
    (re.compile(rb"\s*{\s*\n"), "JSON over several lines", "write one object per line: jq -c ."),
)
"""First bytes of a file that is no UTF-8 text, or no JSON Lines: what it is, and what to do."""


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
        head, raw = _with_head(self._raw_pieces())
        if self.path == STDIN:
            suffix = next((s for s, magic in MAGIC.items() if magic.match(head)), "")
        else:
            suffix = self.path.suffix.lower()
        if suffix in MAGIC:
            yield from self._decompressed(head, raw, suffix)
        else:
            yield from raw

    def text_pieces(self, is_json_lines: bool = False) -> Iterator[bytes]:
        """`pieces` of a file of UTF-8 text, without a byte order mark.

        Raises:
            DataError: also if the file begins like one of another kind.
        """
        head, pieces = _with_head(self.pieces())
        num_skipped = len(BYTE_ORDER_MARK) if head.startswith(BYTE_ORDER_MARK) else 0
        for begin, what, remedy in (*_NOT_TEXT, *(_NOT_LINES if is_json_lines else ())):
            if begin.match(head, num_skipped):
                raise self.error(f"its content is {what}; {remedy}")
        for piece in pieces:
            if rest := piece[num_skipped:]:
                yield rest
            num_skipped = max(num_skipped - len(piece), 0)

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

    def _decompressed(self, head: bytes, raw: Iterator[bytes], suffix: str) -> Iterator[bytes]:
        """The content of one or more concatenated compressed streams."""
        name = suffix[1:]
        try:
            yield from _unpack_zstd(raw) if suffix == ".zst" else _unpack(raw, suffix)
        except EOFError:
            raise self.error(f"its {name} data ends early; copy or download it again") from None
        except (zlib.error, lzma.LZMAError, OSError) as error:
            if not MAGIC[suffix].match(head):
                raise self.error(
                    f"its name says {name}, but its content is something else; rename it"
                ) from None
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
    num_padding = 0
    for piece in raw:
        while piece:
            if decompressor is None:
                if not is_first and suffix in (".gz", ".xz"):
                    # gzip allows zeros behind a stream, for tapes; xz allows a multiple of 4.
                    stripped = piece.lstrip(b"\0")
                    num_padding += len(piece) - len(stripped)
                    piece = stripped
                    if not piece:
                        break
                    _check_padding(num_padding, suffix)
                    num_padding = 0
                decompressor = DECOMPRESSORS[suffix]()
            is_first = False
            yield from _outputs(decompressor, piece)
            piece = decompressor.unused_data if decompressor.eof else b""
            if decompressor.eof:
                decompressor = None
    if decompressor is not None or is_first:
        raise EOFError
    _check_padding(num_padding, suffix)


def _check_padding(num_bytes: int, suffix: str) -> None:
    if suffix == ".xz" and num_bytes % 4:
        raise lzma.LZMAError(f"padding of {num_bytes} bytes, which is not a multiple of 4")


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

    Names that begin with a dot are left out unless given as such: they are copies made by editors,
    notebooks and downloads. What a folder or glob stands for is logged.

    Raises:
        DataError: an entry matches no file, or a file is given twice.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path == STDIN or path.is_file():
            files.append(path)
            continue
        if path.is_dir():
            every = sorted(p for p in path.rglob("*") if p.is_file())
            found = [p for p in every if not _is_hidden(p.relative_to(path))]
        else:
            every = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
            found = every = [p for p in every if p.is_file()]
        num_hidden = len(every) - len(found)
        if not found:
            hidden = f", except {num_hidden} hidden (name them to read them)" if num_hidden else ""
            raise DataError(
                f"--input {pattern}: no such file, and nothing matches it as a pattern{hidden}."
            )
        names = ", ".join(map(str, found[:NAMES_SHOWN]))
        more = f" and {len(found) - NAMES_SHOWN} more" if len(found) > NAMES_SHOWN else ""
        left_out = f"; {num_hidden} hidden left out" if num_hidden else ""
        logger.info("%s: %d files: %s%s%s", pattern, len(found), names, more, left_out)
        files += found
    _refuse_repeated(files)
    return files


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _refuse_repeated(files: Sequence[Path]) -> None:
    """Refuse a file that would be read twice, by whatever names."""
    if files.count(STDIN) > 1:
        raise DataError("--input - can be given once only: standard input is read once.")
    seen: dict[Path, Path] = {}
    for file in files:
        first = seen.setdefault(file.resolve(), file)
        if first is not file:
            also = "" if first == file else f", also as {first}"
            raise DataError(
                f"--input: {file} is given twice{also}, so its documents would be read twice. Give "
                "each file once."
            )


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


def _with_head(pieces: Iterator[bytes]) -> tuple[bytes, Iterator[bytes]]:
    """The first bytes, and all pieces."""
    first: list[bytes] = []
    for piece in pieces:
        first.append(piece)
        if sum(map(len, first)) >= HEAD_BYTES:
            break
    return b"".join(first)[:HEAD_BYTES], itertools.chain(first, pieces)
