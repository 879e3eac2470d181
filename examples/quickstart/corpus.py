"""A corpus that is on every machine: the text of the running Python's standard library.

Needs no network. Two kinds of documents come out of it, one JSON object a line (`text`, `source`,
`kind`):

- `source`: the source of a module, cut at top-level definitions into pieces of some 30 kB;
- `prose`: English only - a module's docstrings joined, and each topic of the language reference
  that `help()` shows (`pydoc_data.topics`).

The order and the split are functions of the relative paths alone: a file is held out, with all its
documents, if the hash of its path says so. Left out: tests, installed packages, generated tables
(codecs, Unicode and entity tables) and the Windows- or build-specific files that hold them.
Whether two machines get the same corpus depends on their having the same Python.
"""

import ast
import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

from megatron_ponder.errors import DataError

SKIPPED_FOLDERS = frozenset(
    # not part of the library, tests, or tables generated from the Unicode data
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
    """Relative paths of the modules that enter the corpus, sorted, with forward slashes."""
    found = []
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        for name in files:
            if name.endswith(".py") and not name.startswith(tuple(SKIPPED_FILES)):
                found.append((Path(folder) / name).relative_to(library).as_posix())
    return sorted(found)


def is_held_out(path: str) -> bool:
    """Whether the hash of a relative path puts all of that file's documents into the test set."""
    digest = hashlib.sha1(path.encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest[:4], "big") % 100 < HELD_OUT_PERCENT


def documents(library: Path) -> Iterator[dict[str, str]]:
    """All documents of a standard library in a fixed order.

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
            continue  # lib2to3 and the like ship a few files that are broken on purpose
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
        train: file for what is trained on.
        held_out: file for what is only evaluated on.
        library: folder of the standard library.

    Returns:
        Documents and UTF-8 bytes of each split.

    Raises:
        DataError: too little text is there (a zipped or minimal Python).
    """
    splits: dict[str, list[dict[str, str]]] = {"train": [], "held_out": []}
    for document in documents(library):
        splits["held_out" if is_held_out(document["source"]) else "train"].append(document)
    num_chars = sum(len(d["text"]) for split in splits.values() for d in split)
    if num_chars < MIN_CORPUS_CHARS or not splits["held_out"]:
        raise DataError(
            f"{library}: {num_chars:,} characters of Python source, of which "
            f"{len(splits['held_out'])} documents would be held out; at least "
            f"{MIN_CORPUS_CHARS:,} and 1 are needed. If this is a Python's library, it is stripped "
            "or zipped: use a complete Python (python.org, pyenv, conda, or your system's full "
            "package)."
        )
    sizes = {}
    for name, path in (("train", train), ("held_out", held_out)):
        lines = [json.dumps(d, ensure_ascii=False, sort_keys=True) + "\n" for d in splits[name]]
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        unfinished.write_text("".join(lines), encoding="utf-8")
        unfinished.replace(path)
        sizes[f"{name}_documents"] = len(lines)
        sizes[f"{name}_bytes"] = sum(len(d["text"].encode()) for d in splits[name])
    return sizes


def _topics(tree: ast.Module) -> dict[str, str]:
    """The language reference: the string values of the one dictionary in pydoc_data/topics.py."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            return {str(k): str(v) for k, v in ast.literal_eval(node.value).items()}
    return {}


def _docstrings(tree: ast.Module) -> str:
    """Docstrings of a module, its classes and functions, in order, a blank line between them."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(tree) if isinstance(node, kinds)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))
    found = (ast.get_docstring(node) for node in nodes)
    return "\n\n".join(text for text in found if text)


def _pieces(source: str) -> Iterator[str]:
    """Cut a module before top-level definitions into pieces of about MAX_DOCUMENT_CHARS."""
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
