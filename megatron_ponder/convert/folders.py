"""A folder that is either complete or not there, and that replaces only its own earlier version.

What a conversion writes is listed in conversion.json beside it, so that --overwrite can tell its
files from those that a user, or a training run, has put there since. Imports no torch.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from megatron_ponder.convert.json_values import read_object
from megatron_ponder.errors import ConversionError
from megatron_ponder.files import write_json

RECORD = "conversion.json"
MAX_HASHED_BYTES = 64 << 20
"""Larger files are weights; they are known by their size."""


@contextlib.contextmanager
def new_folder(
    target: Path, flag: str, *, overwrite: bool, keep_out: Path, first: str
) -> Iterator[Path]:
    """A folder beside `target` to write into, which gets its name if the block ends well.

    What was there before stays until then. If the block fails, nothing is left. With `overwrite`
    the files that an earlier conversion wrote are replaced, and all others stay.

    Args:
        target: the folder to make.
        flag: that it was given by.
        overwrite: whether it may hold an earlier conversion.
        keep_out: a folder being read, which must not lie inside the replaced one.
        first: a file that will surely be written, so that one in its place is found early.

    Raises:
        ConversionError: it is there, has files that would be lost, or cannot be written.
    """
    target = target.resolve()
    _check_target(target, flag, overwrite, keep_out.resolve())
    earlier = _read_record(target)
    _check_foreign(target, earlier, [Path(first)])
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        _write_record(unfinished)
        _check_foreign(target, earlier, _files(unfinished))
        _replace(target, unfinished, earlier)
    except OSError as error:
        if error.filename is not None:
            raise
        raise ConversionError(f"{flag} {target}: cannot be written: {error.strerror}.") from None
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _files(folder: Path) -> list[Path]:
    """All files below a folder, by their paths in it."""
    return [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]


def _describe(path: Path) -> str:
    """What tells a file from a changed one."""
    size = path.stat().st_size
    if size > MAX_HASHED_BYTES:
        return f"{size} bytes"
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_record(folder: Path) -> None:
    """List what was written."""
    files = {path.as_posix(): _describe(folder / path) for path in _files(folder)}
    write_json(folder / RECORD, {"files": files})


def _read_record(folder: Path) -> set[Path]:
    """Files of an earlier conversion that are still as it wrote them, the record among them.

    Raises:
        ConversionError: the record cannot be read.
    """
    try:
        files = read_object(folder / RECORD).get("files")
    except (FileNotFoundError, NotADirectoryError):
        return set()
    if not isinstance(files, dict):
        raise ConversionError(f"{folder / RECORD}: does not list files. Give another folder.")
    is_same = {
        Path(name): (folder / name).is_file() and _describe(folder / name) == described
        for name, described in files.items()
        if not Path(name).is_absolute() and ".." not in Path(name).parts
    }
    return {Path(RECORD), *(name for name, same in is_same.items() if same)}


def _check_foreign(target: Path, earlier: set[Path], wanted: list[Path]) -> None:
    """Refuse to write where there is a file that no conversion wrote, or that was changed since.

    Raises:
        ConversionError: there is one.
    """
    places = {place for path in wanted for place in (path, *path.parents) if place.name}
    foreign = sorted(
        str(place)
        for place in places - earlier
        if os.path.lexists(target / place)
        and not (place not in wanted and (target / place).is_dir())
    )
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise ConversionError(
            f"{target}: {', '.join(foreign[:3])}{more} would be lost: not written by a conversion "
            "of this version, or changed since. Move it away, or give another folder."
        )


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


def _replace(target: Path, unfinished: Path, earlier: set[Path]) -> None:
    """Put the new folder in the old one's place, with everything in it that is not `earlier`."""
    if not target.exists():
        unfinished.rename(target)
        return
    replaced = target.with_name(f".{target.name}.{os.getpid()}.replaced")
    target.rename(replaced)
    unfinished.rename(target)
    for path in earlier:
        (replaced / path).unlink(missing_ok=True)
    _move_rest(replaced, target)


def _move_rest(source: Path, target: Path) -> None:
    """Move what is left in a folder into another one, and remove the first."""
    for path in list(source.iterdir()):
        place = target / path.name
        if place.is_dir() and path.is_dir() and not path.is_symlink():
            _move_rest(path, place)
        else:
            path.rename(place)
    source.rmdir()
