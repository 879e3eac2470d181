"""Documents from JSON Lines and plain text files, streamed.

Reading is cheap and happens in one process: a reader yields raw bytes with where they come from,
and workers decode them (`RawDocument.texts`). Nothing is skipped silently: what cannot be a
document is a DataError that names file, line and reason. Left out in this version: compressed and
columnar files.
"""

import dataclasses
import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from megatron_ponder.errors import DataError

InputFormat = Literal["auto", "jsonl", "text"]
JSON_LINES_SUFFIXES = (".jsonl", ".json", ".ndjson")
TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")


@dataclasses.dataclass(frozen=True)
class RawDocument:
    """One undecoded document and its place."""

    content: bytes
    is_json: bool
    file: str
    line: int
    """Of its first line, from 1."""

    def texts(self, keys: Sequence[str]) -> list[str]:
        """The document's text under each key; a plain text is the same under all of them.

        Raises:
            DataError: the bytes are not UTF-8 or not JSON, or a key is missing or not a string.
        """
        try:
            text = self.content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._error(f"not valid UTF-8 ({error.reason})") from None
        if not self.is_json:
            return [text for _ in keys]
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._error(f"not valid JSON ({error})") from None
        if not isinstance(record, dict):
            raise self._error("not a JSON object")
        for key in keys:
            if not isinstance(record.get(key), str):
                problem = "is not a string" if key in record else "is missing"
                raise self._error(f"key {key!r} {problem} (--json-keys names the text)")
            if not record[key].isascii() and any("\ud800" <= c <= "\udfff" for c in record[key]):
                raise self._error(f"key {key!r} has a lone surrogate, which no UTF-8 text can")
        return [record[key] for key in keys]

    def _error(self, reason: str) -> DataError:
        return DataError(f"{self.file}:{self.line}: {reason}.")


def find_inputs(patterns: Sequence[str]) -> list[Path]:
    """Files, folders (every file below, sorted) and globs, as files in order.

    Raises:
        DataError: something matches nothing.
    """
    files: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.is_file())
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
            found = [p for p in found if p.is_file()]
        if not found:
            raise DataError(f"--input {pattern}: no such file, and nothing matches it.")
        files += found
    return files


def read_documents(
    files: Sequence[Path], input_format: InputFormat, split_paragraphs: bool = False
) -> Iterator[RawDocument]:
    """All documents of all files, in order.

    Args:
        files: from `find_inputs`.
        input_format: auto goes by each file's suffix.
        split_paragraphs: plain text: a document per block between blank lines, not per file.

    Raises:
        DataError: a file cannot be read, or auto does not know its suffix.
    """
    for file in files:
        try:
            if _is_json_lines(file, input_format):
                yield from _read_lines(file)
            elif split_paragraphs:
                yield from _read_paragraphs(file)
            else:
                yield RawDocument(file.read_bytes(), False, str(file), 1)
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}.") from None


def _is_json_lines(file: Path, input_format: InputFormat) -> bool:
    """Whether a file is JSON Lines; otherwise it is plain text."""
    if input_format != "auto":
        return input_format == "jsonl"
    suffix = file.suffix.lower()
    if suffix not in JSON_LINES_SUFFIXES + TEXT_SUFFIXES:
        raise DataError(f"{file}: cannot tell its format; give --input-format jsonl or text.")
    return suffix in JSON_LINES_SUFFIXES


def _read_lines(file: Path) -> Iterator[RawDocument]:
    """A document per line; lines of nothing but white space separate and are no documents."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield RawDocument(line, True, str(file), number)


def _read_paragraphs(file: Path) -> Iterator[RawDocument]:
    """A document per run of lines that are not blank."""
    block: list[bytes] = []
    first = 1
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                first = first if block else number
                block.append(line)
            elif block:
                yield RawDocument(b"".join(block), False, str(file), first)
                block = []
    if block:
        yield RawDocument(b"".join(block), False, str(file), first)
