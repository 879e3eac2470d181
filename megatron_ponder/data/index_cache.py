"""megatron-core's sample and shuffle indexes, built once and published atomically.

megatron-core writes indexes in place, keyed by the path of the data, and accepts any file with the
right name as complete. Here they are built in a temporary folder, which is renamed when it is
complete. The final name is a hash of the content of the data and of everything else that determines
the order. So a killed run, two concurrent runs, or data rewritten under the same name cannot leave
a wrong index. Not covered: the content of the indexes.
"""

import errno
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_ponder.data.fingerprint import identity
from megatron_ponder.errors import DataError

T = TypeVar("T")


def build_once(cache: Path, settings: Mapping[str, Any], build: Callable[[str], T]) -> T:
    """Call `build` on all ranks with a folder that holds the complete indexes.

    Args:
        cache: parent of these folders.
        settings: everything that determines what `build` writes.
        build: builds on rank 0 what its folder lacks, then loads it on every rank.

    Raises:
        DataError: the cache cannot be written.
    """
    folder = cache / identity(settings)
    unfinished = _from_rank_zero(lambda: _new_folder(cache, folder))
    if unfinished is not None:
        build(unfinished)
        _barrier()
        _from_rank_zero(lambda: _publish(Path(unfinished), folder))
    return build(str(folder))


def _new_folder(cache: Path, folder: Path) -> str | None:
    """Create a temporary folder to build in; None if the indexes exist."""
    if folder.is_dir():
        return None
    unfinished = cache / f".{folder.name}.{uuid.uuid4().hex[:12]}.unfinished"
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise DataError(
            f"{cache}: the data indexes cannot be written here ({error.strerror}). Give a writable "
            "folder as --data-cache-path, or build the indexes before the run with "
            "tools/prepare_index.py."
        ) from None
    return str(unfinished)


def _publish(unfinished: Path, folder: Path) -> None:
    """Rename the folder to its final name, unless another run was faster."""
    try:
        os.rename(unfinished, folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise DataError(f"{folder}: cannot be written: {error.strerror}.") from None


def _from_rank_zero(function: Callable[[], T]) -> T:
    """Run `function` on rank 0; return its result, or raise its error, on every rank."""
    if not dist.is_initialized():
        return function()
    result: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            result[0] = function()
        except DataError as error:
            result[1] = str(error)
    dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise DataError(result[1])
    value: T = result[0]
    return value


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
