"""Merges indexed datasets into one: concatenates their data and writes a new index.

The result equals that of megatron-core's IndexedDatasetBuilder.add_index. Not covered: blending,
which needs no new files (--data-path takes several datasets).
"""

import dataclasses
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy

from megatron_ponder.data.indexed import (
    IndexFile,
    check_indexed_dataset,
    data_file,
    index_file,
    open_index,
)
from megatron_ponder.data.manifest import FORMAT, find_manifest, text_bytes
from megatron_ponder.data.publishing import publish, refuse_existing, write_dataset
from megatron_ponder.errors import DataError

COPY_BYTES = 1 << 22


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Flags of tools/merge_datasets.py."""

    input: tuple[str, ...]
    """Prefixes of the datasets, in order. A folder means all datasets in it, sorted by name."""
    output_prefix: str
    """Write PREFIX.bin, PREFIX.idx and PREFIX.manifest.json."""
    overwrite: bool = False
    """Replace existing output."""


def merge_datasets(config: MergeConfig) -> dict[str, Any]:
    """Write the merged dataset.

    Returns:
        Its entry in the manifest.

    Raises:
        DataError: a dataset is missing or damaged, or the datasets cannot be merged.
    """
    prefixes = _find_prefixes(config.input)
    output = Path(config.output_prefix)
    if output.resolve() in [Path(prefix).resolve() for prefix in prefixes]:
        raise DataError(f"--output-prefix {output}: is one of the inputs. Give another prefix.")
    refuse_existing(output, [output], config.overwrite)
    for prefix in prefixes:
        check_indexed_dataset(prefix)
    parts = [_Part(prefix, open_index(index_file(prefix))) for prefix in prefixes]
    tokenizer = _check_alike(parts)
    folder = output.with_name(f".{output.name}.{os.getpid()}.merging")
    folder.mkdir()
    try:
        staged = folder / output.name
        entry = write_dataset(staged, parts[0].index.dtype, parts)
        sizes = [size for size in map(text_bytes, prefixes) if size is not None]
        if len(sizes) == len(prefixes):
            entry["text_bytes"] = sum(sizes)
        manifest = {
            "format": FORMAT,
            "merged": [str(prefix) for prefix in prefixes],
            "tokenizer": tokenizer,
            "datasets": {output.name: entry},
        }
        publish(output, {output: staged}, manifest, None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return entry


@dataclasses.dataclass(frozen=True)
class _Part:
    """A whole dataset as part of the merged one."""

    prefix: str
    index: IndexFile

    @property
    def num_sequences(self) -> int:
        return len(self.index.lengths)

    @property
    def num_documents(self) -> int:
        return len(self.index.boundaries) - 1

    def lengths(self) -> numpy.ndarray:
        return self.index.lengths

    def ends(self) -> numpy.ndarray:
        return self.index.boundaries[1:]

    def pieces(self) -> Iterator[bytes]:
        with data_file(self.prefix).open("rb") as file:
            yield from iter(lambda: file.read(COPY_BYTES), b"")


def _find_prefixes(inputs: Sequence[str]) -> list[str]:
    """Prefixes, with each folder replaced by the datasets in it."""
    prefixes: list[str] = []
    for given in inputs:
        if not Path(given).is_dir():
            prefixes.append(given)
            continue
        found = sorted(str(path.with_suffix("")) for path in Path(given).glob("*.idx"))
        if not found:
            raise DataError(f"--input {given}: this folder contains no dataset (.idx).")
        prefixes += found
    return prefixes


def _check_alike(parts: Sequence[_Part]) -> dict[str, Any] | None:
    """Refuse datasets that cannot be merged.

    Returns:
        Their tokenizer, if any of their manifests states it.
    """
    first = parts[0]
    known: tuple[str, dict[str, Any]] | None = None
    for part in parts:
        if part.index.dtype is not first.index.dtype:
            raise DataError(
                f"{part.prefix} holds {part.index.dtype.__name__}, {first.prefix} "
                f"{first.index.dtype.__name__}: they were made with different tokenizers and "
                "cannot be merged. Preprocess one of them again."
            )
        manifest = find_manifest(part.prefix)
        tokenizer = manifest[1].get("tokenizer") if manifest else None
        if tokenizer is None:
            continue
        if known is not None and known[1] != tokenizer:
            raise DataError(
                f"{part.prefix} was made with another tokenizer than {known[0]}; preprocess one of "
                "them again."
            )
        known = known or (part.prefix, tokenizer)
    return known[1] if known else None
