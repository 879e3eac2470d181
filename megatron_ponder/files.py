"""Files that are complete or absent, also after a crash or a power failure. Imports no torch."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def published(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; after the block, flush the file to disk and rename it.

    The temporary name keeps the suffix, which some libraries take the format from. If the block
    raises, the temporary file is removed and `path` stays as it was. Missing folders are created.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Publish a text file in UTF-8."""
    with published(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Publish a JSON file."""
    write_text(path, json.dumps(content, indent=1) + "\n")
