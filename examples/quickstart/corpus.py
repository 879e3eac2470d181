"""Builds a corpus that exists on every machine: the source of Python's standard library.

Needs no network. Writes one JSON object per line (`text`, `source`, `kind`), of two kinds:

- `source`: the source of a module, cut at top-level definitions into pieces of about 30 kB;
- `prose`: English text, namely the docstrings of a module, joined, and each topic of the language
  reference that `help()` shows (`pydoc_data.topics`).

Order and split depend only on relative paths: a hash of its path decides whether a file is held
out, with all its documents. Excluded are tests, installed packages, generated tables (codecs,
Unicode and entity tables) and build-specific files. Two machines get the same corpus if they have
the same Python.
"""

import ast
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from megatron_ponder.errors import DataError
from megatron_ponder.files import write_text

SKIPPED_FOLDERS = frozenset(
    # installed packages, caches, tests, and generated codec tables
    (
        "site-packages",
        "dist-packages",
        "__pycache__",
        "test",
        "tests",
        "idle_test",
        "encodings",
    )
)
SKIPPED_FILES = frozenset(("entities.py", "_sysconfigdata", "this.py", "antigravity.py"))
TOPICS_FILE = "pydoc_data/topics.py"
MAX_DOCUMENT_CHARS = 30_000
MIN_DOCUMENT_CHARS = 200
MIN_CORPUS_CHARS = 400_000
HELD_OUT_PERCENT = 5


def library_files(library: Path) -> list[str]:
    """Relative paths of the modules in the corpus, sorted, with forward slashes."""
    found = []
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for name in files:
            if name.endswith(".py") and not name.startswith(tuple(SKIPPED_FILES)):
                found.append((Path(folder) / name).relative_to(library).as_posix())
    return sorted(found)


def is_held_out(path: str) -> bool:
    """Whether all documents of the file at this relative path are held out."""
    digest = hashlib.sha1(path.encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def documents(library: Path) -> Iterator[dict[str, str]]:
    """All documents of a standard library, in a fixed order.

    Yields:
        `text`; `source`, the relative path (a topic: path#topic); `kind`, "source" or "prose".
    """
    for path in library_files(library):
        try:
            source = (library / path).read_text(encoding="utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old modules have invalid escapes
                tree = ast.parse(source)
        except (UnicodeDecodeError, SyntaxError):
            continue  # some modules ship files that are invalid on purpose
        if path == TOPICS_FILE:
            for name, text in sorted(_topics(tree).items()):
                yield {"text": text, "source": f"{path}#{name}", "kind": "prose"}
            continue
        for text in _pieces(source):
            yield {"text": text, "source": path, "kind": "source"}
        prose = _docstrings(tree)
        if len(prose) >= MIN_DOCUMENT_CHARS:
            yield {"text": prose, "source": path, "kind": "prose"}


def write_corpus(train: Path, held_out: Path, library: Path) -> dict[str, int]:
    """Write both splits as JSON Lines.

    Args:
        train: file for the training split.
        held_out: file for the split that is only used for evaluation.
        library: folder of the standard library.

    Returns:
        Documents and UTF-8 bytes of each split.

    Raises:
        DataError: the library has too little text (a zipped or minimal Python).
    """
    splits: dict[str, list[dict[str, str]]] = {"train": [], "held_out": []}
    for document in documents(library):
        splits["held_out" if is_held_out(document["source"]) else "train"].append(document)
    num_chars = sum(len(d["text"]) for split in splits.values() for d in split)
    if num_chars < MIN_CORPUS_CHARS or not splits["held_out"]:
        raise DataError(
            f"{library}: has {num_chars:,} characters of Python source and "
            f"{len(splits['held_out'])} held-out documents; at least {MIN_CORPUS_CHARS:,} and 1 "
            "are needed. The library of this Python is stripped or zipped: use a complete Python "
            "(python.org, pyenv, conda, or your system's full package)."
        )
    sizes = {}
    for name, path in (("train", train), ("held_out", held_out)):
        lines = [json.dumps(d, ensure_ascii=False, sort_keys=True) + "\n" for d in splits[name]]
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "".join(lines))
        sizes[f"{name}_documents"] = len(lines)
        sizes[f"{name}_bytes"] = sum(len(d["text"].encode()) for d in splits[name])
    return sizes


def _topics(tree: ast.Module) -> dict[str, str]:
    """Topics of the language reference: the dictionary in pydoc_data/topics.py."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return {str(k): str(v) for k, v in ast.literal_eval(node.value).items()}
    return {}


def _docstrings(tree: ast.Module) -> str:
    """Docstrings of a module, its classes and functions, in order, separated by blank lines."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found = (ast.get_docstring(node) for node in nodes)
    return "\n\n".join(text for text in found if text)


def _pieces(source: str) -> Iterator[str]:
    """Cut a module at top-level definitions into pieces of about MAX_DOCUMENT_CHARS."""
    piece: list[str] = []
    length = 0
    for line in source.splitlines(keepends=True):
        is_boundary = line.startswith(("def ", "class ", "@", "async def "))
        if (length > MAX_DOCUMENT_CHARS and is_boundary) or length > 2 * MAX_DOCUMENT_CHARS:
            yield "".join(piece)
            piece, length = [], 0
        piece.append(line)
        length += len(line)
    if length >= MIN_DOCUMENT_CHARS:
        yield "".join(piece)
