"""Says why a dataset is not there: what the path names instead, or which datasets lie beside it."""

import difflib
import os
from pathlib import Path

from megatron_ponder.errors import DataError

_NUM_NEIGHBOURS = 5


def missing_dataset(prefix: str) -> DataError:
    """The error for a prefix without a .bin and .idx.

    Args:
        prefix: as given by the user.
    """
    path, folder = Path(prefix), Path(prefix).parent
    if prefix.endswith((".bin", ".idx")) and path.is_file():
        return DataError(f"{prefix}: give the prefix of the dataset, {prefix[:-4]}, without .bin.")
    if path.is_file():
        return DataError(
            f"{prefix}: is a file, not an indexed dataset. Preprocess it first:\n"
            f"  python tools/preprocess_data.py --input {prefix} --output-prefix {_stem(path)} "
            "--tokenizer-model TOKENIZER --append-eod\n"
            f"Then the dataset is {_stem(path)}_text_document."
        )
    if not path.is_dir() and not folder.is_dir():
        return DataError(f"{prefix}: no such dataset, there is no folder {folder}.")
    lacking = [end for end in (".idx", ".bin") if not Path(prefix + end).is_file()]
    return DataError(
        f"{prefix}{lacking[0]}: no such file. A dataset is named by its prefix, without .bin or "
        f".idx; tools/preprocess_data.py writes one. {_neighbours(path)}"
    )


def _stem(path: Path) -> Path:
    """The path without its suffixes: corpus.jsonl.zst is corpus."""
    return path.with_name(path.name.split(".")[0] or path.name)


def _neighbours(path: Path) -> str:
    """The datasets in the folder, those with the most similar names first."""
    folder = path if path.is_dir() else path.parent
    names = {entry.name[:-4] for entry in os.scandir(folder) if entry.name.endswith(".idx")}
    there = sorted(name for name in names if (folder / f"{name}.bin").is_file())
    if not there:
        return f"There is none in {folder}."
    close = difflib.get_close_matches(path.name, there, n=_NUM_NEIGHBOURS, cutoff=0.0)
    more = len(there) - len(close)
    listed = ", ".join(str(folder / name) for name in close)
    return f"In that folder: {listed}{f' and {more} more' if more else ''}."
