"""The working folder of an unfinished preprocessing run: plan, shards and lock.

    .PREFIX.partial/lock            held while any process of the run is alive
    .PREFIX.partial/plan.json       input, options and tokenizer, on which the shards depend
    .PREFIX.partial/00000012.shard  finished chunks
    .PREFIX.partial/publishing      exists while outputs are being published

A run killed at any moment can be resumed from this folder by the same command. A run with another
plan starts afresh and logs what differs.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from megatron_ponder.errors import DataError
from megatron_ponder.files import write_json

logger = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 20.0
"""Workers of a killed run hold the lock until they notice and exit."""
SHARD_SUFFIX = ".shard"


class WorkFolder:
    """The files of an unfinished run; see `opened`."""

    def __init__(self, path: Path) -> None:
        """Set the path; nothing is created yet."""
        self.path = path

    def shard(self, index: int) -> Path:
        """Path of the shard of a chunk."""
        return self.path / f"{index:08d}{SHARD_SUFFIX}"

    @property
    def has_shards(self) -> bool:
        """Whether any chunk is finished."""
        return any(self.path.glob(f"*{SHARD_SUFFIX}"))

    @property
    def is_publishing(self) -> bool:
        """Whether a run was interrupted while it published outputs."""
        return self._publishing.exists()

    def start_publishing(self) -> None:
        """Record that existing outputs may now be this run's own."""
        self._publishing.touch()

    def remove(self) -> None:
        """Remove the folder; it is renamed first, so it never looks resumable."""
        removed = self.path.with_suffix(".removed")
        shutil.rmtree(removed, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)

    def take_up(self, plan: dict[str, Any]) -> None:
        """Keep the shards of an earlier run with the same plan; remove everything else."""
        file = self.path / "plan.json"
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            before = None
        before = before if isinstance(before, dict) else None
        if before != plan:
            if before is not None and self.has_shards:
                changed = [name for name in plan if before.get(name) != plan[name]]
                logger.info(
                    "not resuming an interrupted run: it had another %s", ", ".join(changed)
                )
            for stale in self.path.iterdir():
                if stale.name != "lock":
                    stale.unlink()
            write_json(file, plan)
        for stale in self.path.glob("*.unfinished"):
            stale.unlink()

    @property
    def _publishing(self) -> Path:
        return self.path / "publishing"


@contextlib.contextmanager
def opened(prefix: Path) -> Iterator[WorkFolder]:
    """The working folder of an output prefix, locked by this process.

    Raises:
        DataError: another run has locked it.
    """
    folder = WorkFolder(prefix.with_name(f".{prefix.name}.partial"))
    shutil.rmtree(folder.path.with_suffix(".removed"), ignore_errors=True)
    lock = _locked(folder.path, prefix)
    with contextlib.closing(lock):
        try:
            yield folder
        finally:
            if not folder.has_shards:
                folder.remove()


def _locked(folder: Path, prefix: Path) -> IO[str]:
    """Lock the folder; create it if missing."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The previous holder may have removed the folder in the meantime.
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / "lock")):
                return lock
        except FileNotFoundError:
            pass
        except BlockingIOError:
            if time.monotonic() > deadline:
                lock.close()
                raise DataError(
                    f"another run is writing {prefix}. Wait until it ends, or stop it."
                ) from None
            time.sleep(0.1)
        lock.close()
