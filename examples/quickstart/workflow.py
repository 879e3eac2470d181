"""A resumable workflow: steps with estimated times, fingerprints of their inputs, and stamps.

Each step leaves a stamp: a fingerprint of everything that determines its result (its settings,
input files, and the fingerprints of earlier steps) and its duration. A step is skipped if its stamp
and outputs exist. If its fingerprint has changed, its outputs are removed and it runs again. An
interrupted step runs again and keeps its partial outputs if the fingerprint is unchanged, so
training resumes from its checkpoint. Not covered: running steps in parallel.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_ponder.errors import PonderError
from megatron_ponder.files import write_json

STAMPS = "stamps"
LOCK_TIMEOUT_S = 60.0
SHORTEST_TIMED_S = 1.0
"""Steps that took less than this say nothing about the speed of the machine."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Step:
    """One step. `run` returns a one-line summary of the result."""

    name: str
    """Short and unique; names the stamp."""
    title: str
    """Description in the plan."""
    estimate_s: float
    """Expected seconds on the 2 cores of our machine."""
    settings: Mapping[str, Any]
    """JSON-serialisable settings that affect its result."""
    inputs: Sequence[Path] = ()
    """Input files from outside the workflow; their content affects the fingerprint."""
    after: Sequence["Step"] = ()
    """Earlier steps whose results it uses."""
    outputs: Sequence[Path]
    """Files and folders that it creates."""
    run: Callable[[], str]

    def fingerprint(self) -> str:
        """Hash of everything that determines the result."""
        content = {
            "name": self.name,
            "settings": self.settings,
            "inputs": [hashlib.sha256(path.read_bytes()).hexdigest() for path in self.inputs],
            "after": [step.fingerprint() for step in self.after],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stamp:
    """State of a step that was started."""

    fingerprint: str
    summary: str | None = None
    """The summary of the step; None until it is finished."""
    seconds: float = 0.0


class Workflow:
    """Runs steps in order, in one folder."""

    def __init__(self, folder: Path, steps: Sequence[Step]) -> None:
        """Store the steps; nothing runs yet."""
        self._stamps_folder = folder / STAMPS
        self._steps = steps

    def print_plan(self) -> None:
        """Print all steps and their expected times."""
        total_s = self._remaining_s(0)
        print(f"{len(self._steps)} steps, {about(total_s)} to go on a machine like ours (2 cores):")
        for number, step in enumerate(self._steps, 1):
            expected = "done" if self._is_finished(step) else about(step.estimate_s)
            print(f"  {number:2}  {step.title:<58} {expected}")
        print(flush=True)

    def start_afresh(self) -> None:
        """Remove every step's outputs and stamp."""
        for step in self._steps:
            _remove([*step.outputs, self._stamp_path(step)])

    def run(self) -> None:
        """Run the steps that are not finished."""
        for index, step in enumerate(self._steps):
            mark = f"[{index + 1}/{len(self._steps)}] {step.title}"
            if self._is_finished(step):
                stamp = self._read(step)
                print(f"{mark}: done before, skipped ({stamp.summary})", flush=True)
                continue
            speed = self._slowness()
            print(
                f"{mark} ({about(step.estimate_s * speed)}; "
                f"{about(self._remaining_s(index) * speed)} remaining in total)",
                flush=True,
            )
            seconds, summary = self._run(step)
            print(f"    {summary} [{seconds:.0f} s]", flush=True)

    def _run(self, step: Step) -> tuple[float, str]:
        """Run one step; write a stamp before and after it."""
        fingerprint = step.fingerprint()
        begun = self._read(step)
        before_s = 0.0
        if begun is not None and begun.fingerprint == fingerprint and begun.summary is None:
            before_s = begun.seconds
        else:
            _remove(step.outputs)
        self._write(step, _Stamp(fingerprint=fingerprint, seconds=before_s))
        start_s = time.monotonic()
        try:
            summary = step.run()
        finally:
            seconds = before_s + time.monotonic() - start_s
            self._write(step, _Stamp(fingerprint=fingerprint, seconds=seconds))
        missing = [str(path) for path in step.outputs if not path.exists()]
        assert not missing, f"step {step.name} did not write {missing}"
        self._write(step, _Stamp(fingerprint=fingerprint, seconds=seconds, summary=summary))
        return seconds, summary

    def _is_finished(self, step: Step) -> bool:
        """Whether the step's outputs exist and its fingerprint is unchanged."""
        stamp = self._read(step)
        return (
            stamp is not None
            and stamp.summary is not None
            and stamp.fingerprint == step.fingerprint()
            and all(path.exists() for path in step.outputs)
        )

    def _remaining_s(self, index: int) -> float:
        """Expected seconds of the unfinished steps from `index` on."""
        return sum(s.estimate_s for s in self._steps[index:] if not self._is_finished(s))

    def _slowness(self) -> float:
        """Measured over expected time of finished steps: how slow this machine is."""
        stamps = {step: self._read(step) for step in self._steps if self._is_finished(step)}
        taken = {
            step: stamp.seconds
            for step, stamp in stamps.items()
            if stamp is not None and stamp.seconds >= SHORTEST_TIMED_S
        }
        estimated_s = sum(step.estimate_s for step in taken)
        return sum(taken.values()) / estimated_s if estimated_s else 1.0

    def _read(self, step: Step) -> _Stamp | None:
        """The step's stamp; None if it was never started or the stamp is damaged."""
        try:
            return _Stamp(**json.loads(self._stamp_path(step).read_text()))
        except (FileNotFoundError, json.JSONDecodeError, TypeError):
            return None

    def _write(self, step: Step, stamp: _Stamp) -> None:
        """Replace the step's stamp."""
        path = self._stamp_path(step)
        write_json(path, dataclasses.asdict(stamp))

    def _stamp_path(self, step: Step) -> Path:
        """Path of the step's stamp."""
        return self._stamps_folder / f"{step.name}.json"


@contextlib.contextmanager
def exclusive(folder: Path, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[int]:
    """Lock the folder, so that two runs do not write the same files.

    Yields:
        The lock's file descriptor. A child process that inherits it keeps the folder locked while
        it lives, even if this process is killed.

    Raises:
        PonderError: the folder contains other files, or another run still holds the lock after
            `timeout_s` seconds.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / STAMPS).is_dir():
        raise PonderError(
            f"--folder {folder}: holds files that are not a quickstart's. Give a new or empty "
            "folder."
        )
    (folder / STAMPS).mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + timeout_s
    with (folder / "lock").open("a") as file:
        is_told = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise PonderError(
                        f"another run is busy in {folder}. Wait until it ends, stop it, or give "
                        "another --folder."
                    ) from None
                if not is_told:
                    print(f"waiting for another run in {folder} to end ...", flush=True)
                    is_told = True
                time.sleep(0.2)
        yield file.fileno()


def about(seconds: float) -> str:
    """A duration in words."""
    return f"about {round(seconds)} s" if seconds < 90 else f"about {seconds / 60:.1f} min"


def _remove(paths: Sequence[Path]) -> None:
    """Remove files and folders, if they exist."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
