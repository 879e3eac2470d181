"""megatron-core's sample and shuffle indexes, built once, complete or not there.

megatron-core writes them where they stay and takes any file with the right name for a finished one,
keyed by the path of the data. Here they are built in a folder beside that is renamed when all of it
is there, and a folder is named after the content of the data and everything else that decides the
order. So neither a run that was killed, nor two that start at once, nor data that was written anew
under the same name can leave a wrong index. Left out: what is in the indexes.
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
    """Call `build` with a folder that holds what it needs, on all ranks.

    Args:
        cache: where such folders lie.
        settings: everything that decides what `build` writes.
        build: builds on rank 0 what its folder lacks, and loads it on every rank.

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
    """A folder to build in; None if all is there."""
    if folder.is_dir():
        return None
    unfinished = cache / f".{folder.name}.{uuid.uuid4().hex[:12]}.unfinished"
    try:
        unfinished.mkdir(parents=True)
    except OSError as error:
        raise DataError(
            f"{cache}: the indexes of the data cannot be written there ({error.strerror}). Give a "
            "folder that can be written as --data-cache-path, or build them before with "
            "tools/prepare_index.py."
        ) from None
    return str(unfinished)


def _publish(unfinished: Path, folder: Path) -> None:
    """Give the folder its name, unless another run was faster."""
    try:
        os.rename(unfinished, folder)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise DataError(f"{folder}: cannot be written: {error.strerror}.") from None


def _from_rank_zero(function: Callable[[], T]) -> T:
    """What `function` returns, or raises, on rank 0."""
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
