"""Starts a command of this repository as a user does, without its six seconds of imports.

The process is forked from the server of tests/ranks.py, which has everything imported. It is a real
one: its own pid, arguments, environment, working directory, standard streams, signals and exit
code. What a fork cannot show is what a fresh interpreter imports; tests of that start one.

Where there is CUDA a fresh interpreter is started all the same: see tests/ranks.py.
"""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tests.ranks import FORK, be_like_a_fresh_process

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 180


class Command:
    """A command that was started; what subprocess.Popen offers of it, under the same names."""

    def __init__(self, process: Any, folder: tempfile.TemporaryDirectory) -> None:
        self._process, self._folder = process, folder
        self.pid: int = process.pid

    @property
    def returncode(self) -> int | None:
        """Exit status, or minus the number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float = TIMEOUT_S) -> int:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: it has not come in time; the process is killed.
        """
        self._process.join(timeout)
        if self.returncode is None:
            self._process.kill()
            self._process.join()
            raise subprocess.TimeoutExpired(self._process.name, timeout, *self._read())
        return self.returncode

    def communicate(self, timeout: float = TIMEOUT_S) -> tuple[bytes, bytes]:
        """Wait for the end; stdout and stderr."""
        self.wait(timeout)
        return self._read()

    def _read(self) -> tuple[bytes, bytes]:
        out, err = (Path(self._folder.name, name).read_bytes() for name in ("stdout", "stderr"))
        return out, err


def start(
    *command: object,
    stdin: bytes = b"",
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> Command | subprocess.Popen:
    """Start a script or a module.

    Args:
        command: path of a script below the repository's root, or "-m" and a module's name; then its
            arguments.
        stdin: what it can read.
        cwd: where it runs.
        env: variables beyond this process's own; what a module reads when it is imported is fixed.
    """
    words = [str(word) for word in command]
    if words[0] != "-m":
        words[0] = str(ROOT / words[0])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **(env or {})}
    folder = tempfile.TemporaryDirectory()
    Path(folder.name, "stdin").write_bytes(stdin)
    for name in ("stdout", "stderr"):
        Path(folder.name, name).touch()
    if torch.cuda.is_available():
        with open(Path(folder.name, "stdin"), "rb") as file:
            return subprocess.Popen(
                [sys.executable, *words], cwd=cwd, env=environment, stdin=file,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
    process = FORK.Process(
        target=_main, args=(words, folder.name, str(cwd), environment), name=" ".join(words)
    )
    process.start()
    return Command(process, folder)


def run_forked(
    *command: object, timeout_s: float = TIMEOUT_S, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, as `start` starts it; its output as text."""
    process = start(*command, **options)
    out, err = process.communicate(timeout=timeout_s)
    return subprocess.CompletedProcess(command, process.returncode, out.decode(), err.decode())


def run_fresh(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments in a fresh interpreter at the repository's root."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    given = {"cwd": ROOT, "env": environment, "timeout": TIMEOUT_S, **options}
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, **given)


def _main(words: list[str], folder: str, cwd: str, environment: dict[str, str]) -> None:
    """The forked process: becomes what `python WORDS` would be."""
    for descriptor, (name, mode) in enumerate((("stdin", "r"), ("stdout", "a"), ("stderr", "a"))):
        file = open(Path(folder, name), mode)
        os.dup2(file.fileno(), descriptor)
        file.close()
    sys.stdin = open(0, closefd=False)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    be_like_a_fresh_process()
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            sys.path.insert(0, str(Path(words[0]).parent))
            runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.stdout.flush()
