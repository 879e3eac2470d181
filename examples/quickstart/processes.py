"""Child processes of the quickstart: started quietly, watched, and never left behind.

Output goes to a log file; if the process fails, the user sees the log's last lines. A child is
told to end (SIGTERM: training saves a checkpoint first) when this process is interrupted, and on
Linux also when it is killed.
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
"""How long a child may take to end itself: torchrun gives its ranks 30 s."""
POLL_S = 0.25
LAST_LINES = 30
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


class StepFailed(PonderError):
    """A child process failed."""


def run_tool(command: Sequence[str], log: Path, lock: int) -> str:
    """Run a command to its end; its progress (stderr) is shown, its result (stdout) returned.

    Args:
        command: program and arguments.
        log: file that keeps the command and its result.
        lock: file descriptor that the child inherits; see `workflow.exclusive`.

    Raises:
        StepFailed: it exits with an error.
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
    """Run a command with all its output in `log`, appended; yields a few times a second.

    Args:
        command: program and arguments.
        log: file for its output.
        lock: as for `run_tool`.
        environment: variables on top of this process's.

    Raises:
        StepFailed: it exits with an error; the message holds the log's last lines.
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
    """A process in a group of its own, which has ended when the block is left."""
    process = subprocess.Popen(
        command,
        text=True,
        # Ctrl-C reaches this process only, which then ends the child in good order.
        start_new_session=True,
        # Between fork and exec it makes one system call and takes no lock.
        preexec_fn=_end_with_parent if sys.platform == "linux" else None,
        pass_fds=(lock,),
        **options,  # type: ignore[call-overload]
    )
    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen) -> None:
    """End a process, gently first; nothing if it has ended."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _end_with_parent() -> None:
    """Runs in the child before it starts: SIGTERM when the parent is gone, however it went."""
    LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
