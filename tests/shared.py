"""Builds what several tests use once per session, also when several pytest workers run them."""

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


def build_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """A folder that `build` has filled; the first worker to ask builds it, the others wait.

    Args:
        factory: pytest's tmp_path_factory.
        name: the folder's name, one for the whole session.
        build: called with an empty folder, which gets its name when the call returns.
    """
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, partial = base / name, base / f"{name}.partial"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            shutil.rmtree(partial, ignore_errors=True)  # of a worker whose build failed
            partial.mkdir()
            build(partial)
            partial.rename(folder)
    return folder
