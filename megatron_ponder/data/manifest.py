"""PREFIX.manifest.json: the inputs, tokenizer and options of a dataset, and hashes of its files.

    format       version of this file
    inputs       path, bytes and SHA-256 of every input file
    tokenizer    kind, SHA-256 of its content, vocabulary size and end id; choices (--add-bos)
    losses       characters that the ids do not give back, by kind
    options      options that affect the result
    documents    read = written + the sum of rejected, which has a count per kind; repeated_keys of
                 the written state a key twice
    datasets     for each: documents, sequences, tokens, dtype, UTF-8 bytes of its text, size and
                 SHA-256 of its files

Two runs on the same input write identical manifests.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_ponder.data.tokenizers import Tokenizer
from megatron_ponder.errors import DataError

FORMAT = 1
SUFFIX = ".manifest.json"
HASH_BYTES = 1 << 22


def manifest_file(prefix: str | Path) -> Path:
    """PREFIX.manifest.json."""
    return Path(f"{prefix}{SUFFIX}")


def find_manifest(dataset: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """Path and content of the manifest of a dataset, by its prefix; None if there is none.

    Raises:
        DataError: the manifest exists but is invalid.
    """
    for path in _candidates(Path(dataset)):
        if not path.is_file():
            continue
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            if Path(dataset).name in manifest["datasets"]:
                _check_types(manifest, Path(dataset).name)
                return path, manifest
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path}: damaged, or no manifest ({error}). Preprocess the corpus again, or "
                "remove the file."
            ) from None
    return None


def _check_types(manifest: dict[str, Any], dataset: str) -> None:
    """Raise a TypeError unless what is read later is of the right type."""
    entry, tokenizer = manifest["datasets"][dataset], manifest.get("tokenizer")
    if not isinstance(entry, dict) or not isinstance(tokenizer, dict | None):
        raise TypeError(f"the entry of {dataset} or of the tokenizer is not an object")
    for number in (entry.get("text_bytes"), (tokenizer or {}).get("vocab_size")):
        if not isinstance(number, int | None) or isinstance(number, bool):
            raise TypeError(f"{number!r} is not a number")


def text_bytes(dataset: str | Path) -> int | None:
    """UTF-8 bytes of a dataset's text; None if no manifest states them for these very files.

    Raises:
        DataError: the manifest is invalid.
    """
    found = find_manifest(dataset)
    entry = found[1]["datasets"][Path(dataset).name] if found else {}
    stated: int | None = entry.get("text_bytes")
    for suffix in ("idx", "bin") if stated is not None else ():
        if hash_file(Path(f"{dataset}.{suffix}")) != entry.get(f"{suffix}_sha256"):
            return None
    return stated


def tokenizer_entry(tokenizer: Tokenizer) -> dict[str, Any]:
    """What identifies a tokenizer."""
    return {
        **tokenizer.unique_identifiers,
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
    }


def check_tokenizer(dataset: str | Path, tokenizer: Tokenizer) -> None:
    """Refuse a dataset whose manifest names another tokenizer than the one given.

    Raises:
        DataError: it does, or the manifest is invalid.
    """
    found = find_manifest(dataset)
    told = found[1].get("tokenizer") if found else None
    ours = tokenizer_entry(tokenizer)
    if found is None or told is None or told == ours:
        return
    model = found[1].get("tokenizer_model")
    raise DataError(
        f"{dataset} was made with another tokenizer: with {describe_tokenizer(told)}"
        f"{f' ({model})' if model else ''}, as {found[0]} says; the one given is "
        f"{describe_tokenizer(ours)}. Give the tokenizer and the flags that the data was made "
        "with, or preprocess the corpus again."
    )


def describe_tokenizer(entry: object) -> str:
    """A tokenizer's identity for a message."""
    if not isinstance(entry, Mapping):
        return str(entry)
    values = {name: str(value)[:12] for name, value in entry.items() if name != "class"}
    stated = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())
    return f"{entry.get('class')} [{stated}]"


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _candidates(dataset: Path) -> Iterator[Path]:
    """Possible manifests of PREFIX_KEY_document; keys and prefixes may contain underscores."""
    name = dataset.name
    yield dataset.with_name(name + SUFFIX)
    while "_" in name:
        name = name.rpartition("_")[0]
        yield dataset.with_name(name + SUFFIX)
