"""Joins datasets from parts and publishes their files when all are complete.

Parts are shards of preprocessing or whole datasets; nothing is tokenized again. Files are written
to a temporary folder beside their destination and then renamed: data first, then indexes, the
manifest last. A .bin without its index is not a dataset, and a manifest means that all files are
complete.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy

from megatron_ponder import log
from megatron_ponder.data.indexed import IndexPart, data_file, index_file, write_index
from megatron_ponder.data.manifest import hash_file, manifest_file
from megatron_ponder.errors import DataError
from megatron_ponder.files import write_json


class DatasetPart(IndexPart, Protocol):
    """Consecutive sequences of a dataset to be written."""

    def pieces(self) -> Iterator[bytes]:
        """The stored ids, in pieces."""


def write_dataset(
    prefix: Path, dtype: type[numpy.number], parts: Sequence[DatasetPart]
) -> dict[str, Any]:
    """Write PREFIX.bin and PREFIX.idx.

    Returns:
        The dataset's entry in a manifest.
    """
    digest = hashlib.sha256()
    size = 0
    with (
        data_file(prefix).open("wb") as file,
        log.progress(None, f"joining {prefix.name}", "B", unit_scale=True) as bar,
    ):
        for part in parts:
            for piece in part.pieces():
                file.write(piece)
                digest.update(piece)
                size += len(piece)
                bar.update(len(piece))
    write_index(index_file(prefix), dtype, parts)
    return {
        "documents": sum(part.num_documents for part in parts),
        "sequences": sum(part.num_sequences for part in parts),
        "tokens": size // numpy.dtype(dtype).itemsize,
        "dtype": numpy.dtype(dtype).name,
        "bin_bytes": size,
        "bin_sha256": digest.hexdigest(),
        "idx_bytes": index_file(prefix).stat().st_size,
        "idx_sha256": hash_file(index_file(prefix)),
    }


def rejected_file(prefix: str | Path) -> Path:
    """PREFIX.rejected.jsonl."""
    return Path(f"{prefix}.rejected.jsonl")


def existing_outputs(prefix: Path, datasets: Sequence[Path]) -> list[Path]:
    """Existing files that a run would replace."""
    files = [f(each) for each in datasets for f in (data_file, index_file)]
    return [f for f in [*files, manifest_file(prefix), rejected_file(prefix)] if f.exists()]


def refuse_existing(prefix: Path, datasets: Sequence[Path], overwrite: bool) -> None:
    """Create the output folder, and refuse to replace outputs unless `overwrite` is set.

    Raises:
        DataError: an output exists.
    """
    prefix.parent.mkdir(parents=True, exist_ok=True)
    existing = existing_outputs(prefix, datasets)
    if existing and not overwrite:
        raise DataError(f"{existing[0]}: exists already; give --overwrite to replace it.")


def publish(
    prefix: Path, staged: Mapping[Path, Path], manifest: dict[str, Any], rejected: Path | None
) -> None:
    """Move finished files to their destination.

    Args:
        prefix: prefix of the manifest and of the list of rejected documents.
        staged: temporary prefix of each dataset, by its final prefix.
        manifest: content of the manifest, written last.
        rejected: file that lists rejected documents; None if there are none.
    """
    for old in (manifest_file(prefix), *map(index_file, staged), rejected_file(prefix)):
        old.unlink(missing_ok=True)
    for place, now in staged.items():
        os.replace(data_file(now), data_file(place))
    if rejected is not None:
        os.replace(rejected, rejected_file(prefix))
    for place, now in staged.items():
        os.replace(index_file(now), index_file(place))
    write_json(manifest_file(prefix), manifest)
