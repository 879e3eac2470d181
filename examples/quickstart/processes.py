"""Runs the child processes of the quickstart; none outlives the quickstart.

Output goes to a log file; if a process fails, its last lines are shown. When this process is
interrupted, its child receives SIGTERM (on which training saves a checkpoint); on Linux also when
this process is killed.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from megatron_ponder.errors import PonderError

GRACE_S = 60.0
"""Seconds between SIGTERM and SIGKILL; torchrun gives its ranks 30 s."""
POLL_S = 0.25
LAST_LINES = 30
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


class StepFailed(PonderError):
    """A child process failed."""


def run_tool(command: Sequence[str], log: Path, lock: int) -> str:
    """Run a command; show its progress (stderr) and return its result (stdout).

    Args:
        command: program and arguments.
        log: file for the command and its result.
        lock: file descriptor that the child inherits; see `workflow.exclusive`.

    Raises:
        StepFailed: the command fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(f"$ {' '.join(command)}\n")
    with _started(command, lock, stdout=subprocess.PIPE) as process:
        output, _ = process.communicate()
    with log.open("a") as file:
        file.write(output)
    if process.returncode != 0:
        raise StepFailed(
            f"exit code {process.returncode} from:\n  {' '.join(command)}\nIts messages are above."
        )
    return output


def run_logged(
    command: Sequence[str], log: Path, lock: int, environment: Mapping[str, str]
) -> Iterator[None]:
    """Run a command, appending all its output to `log`; yields a few times a second.

    Args:
        command: program and arguments.
        log: file for its output.
        lock: as for `run_tool`.
        environment: additional environment variables.

    Raises:
        StepFailed: the command fails; the message contains the last lines of the log.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        streams = {"stdout": file, "stderr": subprocess.STDOUT}
        with _started(command, lock, env={**os.environ, **environment}, **streams) as process:
            while process.poll() is None:
                yield
                time.sleep(POLL_S)
    if process.returncode != 0:
        lines = log.read_text(errors="replace").splitlines()[-LAST_LINES:]
        raise StepFailed(
            f"exit code {process.returncode} from:\n  {' '.join(command)}\n"
            f"The last lines of {log}:\n  " + "\n  ".join(lines)
        )


@contextlib.contextmanager
def _started(command: Sequence[str], lock: int, **options: object) -> Iterator[subprocess.Popen]:
    """Run a process in its own session; it has ended when the block is left."""
    process = subprocess.Popen(
        command,
        text=True,
        # Ctrl-C then reaches only this process, which terminates the child.
        start_new_session=True,
        # It makes a single system call and takes no lock, so it is safe between fork and exec.
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        pass_fds=(lock,),
        **options,  # type: ignore[call-overload]
    )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """End a process with SIGTERM, after GRACE_S seconds with SIGKILL."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end_with_parent() -> None:
    """In the child, before exec: ask for SIGTERM when the parent ends, however it ends."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
