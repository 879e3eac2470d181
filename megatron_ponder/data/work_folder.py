"""The folder of a preprocessing run that is not finished: its plan, its shards, and its lock.

    .PREFIX.partial/lock            held as long as a process of the run lives
    .PREFIX.partial/plan.json       input, options and tokenizer: what shards depend on
    .PREFIX.partial/00000012.shard  finished chunks
    .PREFIX.partial/publishing      the outputs are being put in their places

Killing the run at any moment leaves a folder that the same command goes on from. A run with another
plan starts afresh and says what differs.
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

from megatron_ponder.data.manifest import write_json
from megatron_ponder.errors import DataError

logger = logging.getLogger(__name__)

LOCK_TIMEOUT_S = 20.0
"""Workers of a run that was killed need a moment to notice; they hold the lock until then."""
SHARD_SUFFIX = ".shard"


class WorkFolder:
    """Files of an unfinished run; see `opened`."""

    def __init__(self, path: Path) -> None:
        """Name the folder; nothing is created yet."""
        self.path = path

    def shard(self, index: int) -> Path:
        """Where the shard of a chunk lies."""
        return self.path / f"{index:08d}{SHARD_SUFFIX}"

    @property
    def has_shards(self) -> bool:
        """Whether there is anything worth keeping."""
        return any(self.path.glob(f"*{SHARD_SUFFIX}"))

    @property
    def is_publishing(self) -> bool:
        """Whether a run was stopped while it put outputs in their places."""
        return self._publishing.exists()

    def start_publishing(self) -> None:
        """From here on outputs may be there that are this run's own."""
        self._publishing.touch()

    def remove(self) -> None:
        """Remove the folder; at no moment does it look like one to go on from."""
        removed = self.path.with_suffix(".removed")
        shutil.rmtree(removed, ignore_errors=True)
        with contextlib.suppress(FileNotFoundError):
            self.path.rename(removed)
        shutil.rmtree(removed, ignore_errors=True)

    def take_up(self, plan: dict[str, Any]) -> None:
        """Keep what an earlier run with the same plan left; remove everything else."""
        file = self.path / "plan.json"
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            before = None
        if before != plan:
            if before is not None and self.has_shards:
                changed = [name for name in plan if before.get(name) != plan[name]]
                logger.info(
                    "an interrupted run had other %s; its work is not used", ", ".join(changed)
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
    """The work folder of an output prefix, held by this process.

    Raises:
        DataError: another run holds it.
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
    """The lock of the folder, which is created where it is missing."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The run that held it may have removed the folder in the meantime.
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder / "lock")):
                return lock
        except FileNotFoundError:
            pass
        except BlockingIOError:
            if time.monotonic() > deadline:
                lock.close()
                raise DataError(
                    f"another run is writing {prefix}. Wait until it is done, or stop it."
                ) from None
            time.sleep(0.1)
        lock.close()
