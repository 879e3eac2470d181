"""A folder that is either complete or not there. Imports no torch."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_ponder.errors import ConversionError


@contextlib.contextmanager
def new_folder(target: Path, flag: str, *, overwrite: bool, keep_out: Path) -> Iterator[Path]:
    """A folder beside `target` to write into, which gets its name if the block ends well.

    What was there before stays until then. If the block fails, nothing is left.

    Args:
        target: the folder to make.
        flag: that it was given by.
        overwrite: whether it may be there already.
        keep_out: a folder being read, which must not lie inside the replaced one.

    Raises:
        ConversionError: it is there, or cannot be written.
    """
    target = target.resolve()
    _check_target(target, flag, overwrite, keep_out.resolve())
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        _replace(target, unfinished)
    except OSError as error:
        if error.filename is not None:
            raise
        raise ConversionError(f"{flag} {target}: cannot be written: {error.strerror}.") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def check_space(folder: Path, num_bytes: int) -> None:
    """Refuse to begin what would not fit on the disk.

    Raises:
        ConversionError: there is less room than that.
    """
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ConversionError(
            f"{folder.parent}: {num_bytes / 2**30:.1f} GiB are needed, {free / 2**30:.1f} are free."
        )


def _check_target(target: Path, flag: str, overwrite: bool, keep_out: Path) -> None:
    """Refuse to replace what should stay."""
    if not target.exists():
        return
    if not target.is_dir():
        raise ConversionError(f"{flag} {target}: is a file. Give a folder.")
    if keep_out == target or target in keep_out.parents:
        raise ConversionError(
            f"{flag} {target}: contains the source, {keep_out}. Give another folder."
        )
    if any(target.iterdir()) and not overwrite:
        raise ConversionError(
            f"{flag} {target}: is there and not empty. Give another folder, or --overwrite."
        )


def _replace(target: Path, unfinished: Path) -> None:
    """Put the new folder in the old one's place; the old one goes last."""
    replaced = target.with_name(f".{target.name}.{os.getpid()}.replaced")
    if target.exists():
        target.rename(replaced)
    unfinished.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)
