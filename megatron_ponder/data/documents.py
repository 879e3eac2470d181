"""Documents as stored in files, their texts, and errors for those that are invalid.

The reader cuts files into `Segment`s without parsing them. Worker processes split a segment into
documents and parse these, so the expensive part scales with the number of workers. Not covered:
reading files (readers.py) and recording rejected documents (shards.py).
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import orjson

from megatron_ponder.errors import DataError

SegmentKind = Literal["lines", "text", "rows", "too_long"]
Row = tuple[tuple[str, Any], ...]
"""Columns of a table row by name: text as bytes, None for null, False for any other type."""


class DocumentError(DataError):
    """An invalid document and its location."""

    def __init__(self, kind: str, file: str, line: int, reason: str) -> None:
        """Keep the parts of the message.

        Args:
            kind: one word; rejected documents are counted by it.
            file: as the user named it.
            line: first line, or row, from 1.
            reason: what is wrong.
        """
        super().__init__(f"{file}:{line}: {reason}.")
        self.kind, self.file, self.line, self.reason = kind, file, line, reason

    def as_record(self) -> dict[str, Any]:
        """A line of PREFIX.rejected.jsonl."""
        return {"file": self.file, "line": self.line, "kind": self.kind, "reason": self.reason}


@dataclasses.dataclass(frozen=True, slots=True)
class RawDocument:
    """One document, not yet decoded, and its location."""

    content: bytes | Row
    is_json: bool
    file: str
    line: int
    """Number of its first line, from 1."""

    def texts(self, keys: Sequence[str]) -> list[str]:
        """The document's text under each key; plain text is the same under every key.

        Raises:
            DocumentError: the bytes are not UTF-8 or not JSON, or a key is missing or not text.
        """
        if isinstance(self.content, bytes) and not self.is_json:
            text = self._decoded(self.content)
            return [text for _ in keys]
        record = self.record()
        return [self.text_of(record, key) for key in keys]

    def record(self) -> dict[str, Any]:
        """The JSON object or the row.

        Raises:
            DocumentError: the document is not a JSON object.
        """
        if not isinstance(self.content, bytes):
            return {
                name: self._decoded(value) if isinstance(value, bytes) else value
                for name, value in self.content
            }
        if not self.is_json:
            raise self.error("not_an_object", "plain text has no keys; JSON Lines is needed")
        try:
            record = orjson.loads(self.content)
        except orjson.JSONDecodeError:
            record = self._parsed_slowly(self.content)
        if not isinstance(record, dict):
            raise self.error("not_an_object", "not a JSON object")
        return record

    def repeats_key(self, keys: Sequence[str]) -> bool:
        """Whether an object of this JSON document states one of `keys` twice; the last value wins.

        Only a document in which a key may occur twice is parsed for it.
        """
        if not self.is_json or not isinstance(self.content, bytes):
            return False
        is_escaped = b"\\u00" in self.content or not all(map(str.isascii, keys))
        if not is_escaped and all(self.content.count(orjson.dumps(key)) < 2 for key in keys):
            return False
        repeated: set[str] = set()

        def note(pairs: list[tuple[str, Any]]) -> None:
            names = [name for name, _ in pairs]
            repeated.update(key for key in keys if names.count(key) > 1)

        try:
            json.loads(self.content, object_pairs_hook=note)
        except (ValueError, RecursionError):  # reported when the document is parsed
            return False
        return bool(repeated)

    def text_of(self, record: dict[str, Any], key: str) -> str:
        """The text under a key of this document's record, or of an object inside it.

        Raises:
            DocumentError: the text is missing or not a string.
        """
        text = record.get(key)
        if text is None:
            problem = "is null" if key in record else "is missing"
            raise self.error("missing_text", f"key {key!r} {problem} (--json-keys names the text)")
        if not isinstance(text, str):
            raise self.error("not_a_string", f"key {key!r} is not a string")
        if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):
            raise self.error(
                "lone_surrogate", f"key {key!r} has a lone surrogate, which is not valid in UTF-8"
            )
        return text

    def error(self, kind: str, reason: str) -> DocumentError:
        """A DocumentError at this document's location."""
        return DocumentError(kind, self.file, self.line, reason)

    def _decoded(self, content: bytes) -> str:
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.error("invalid_utf8", f"not valid UTF-8 ({error.reason})") from None

    def _parsed_slowly(self, content: bytes) -> Any:
        """Parse with Python's json, which accepts more than orjson (NaN, lone surrogates)."""
        text = self._decoded(content)
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.error("broken_json", f"not valid JSON ({error})") from None


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """Consecutive documents of one file, unparsed, so that it is cheap to send to a worker."""

    kind: SegmentKind
    """lines: a JSON object per line; text: one document; rows: rows of a table; too_long: one
    document that was dropped because it exceeds the limit."""
    file: str
    first_line: int
    content: bytes | list[Row]

    @property
    def num_bytes(self) -> int:
        """Approximate number of bytes of text."""
        if isinstance(self.content, bytes):
            return len(self.content)
        return sum(_row_bytes(row) for row in self.content)

    def documents(self, max_document_bytes: int) -> Iterator[RawDocument | DocumentError]:
        """Its documents in order, and an error for each that is too long.

        Blank lines are skipped.
        """
        if self.kind == "too_long":
            yield too_long(self.file, self.first_line, max_document_bytes)
            return
        contents: Sequence[bytes | Row]
        if isinstance(self.content, bytes):
            contents = [self.content] if self.kind == "text" else self.content.split(b"\n")
        else:
            contents = self.content
        is_json = self.kind == "lines"
        for line, content in enumerate(contents, self.first_line):
            size = len(content) if isinstance(content, bytes) else _row_bytes(content)
            if size > max_document_bytes:
                yield too_long(self.file, line, max_document_bytes)
            elif not (is_json and isinstance(content, bytes) and not content.strip()):
                yield RawDocument(content, is_json, self.file, line)

    def update(self, digest: "hashlib._Hash") -> None:
        """Add everything that determines the documents to a digest."""
        content = self.content if isinstance(self.content, bytes) else repr(self.content).encode()
        digest.update(f"{self.kind}\0{self.file}\0{self.first_line}\0{len(content)}\0".encode())
        digest.update(content)


def too_long(file: str, line: int, max_document_bytes: int) -> DocumentError:
    """A document over the limit."""
    return DocumentError(
        "too_long", file, line, f"longer than --max-document-bytes {max_document_bytes}"
    )


def _row_bytes(row: Row) -> int:
    """Bytes of text in a row."""
    return sum(len(value) for _, value in row if isinstance(value, bytes))
