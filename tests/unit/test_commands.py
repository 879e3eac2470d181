"""A forked command is the process that a fresh interpreter would be."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.commands import TIMEOUT_S, run_forked, start

pytestmark = pytest.mark.thorough

PROGRAM = """
import os, sys, time
print(sys.argv, sys.path[0], os.getcwd(), os.environ["GIVEN"], __name__, sys.stdin.read())
print("complaint", file=sys.stderr)
if sys.argv[1] == "wait":
    time.sleep(100)
sys.exit({"three": 3, "words": "words", "none": None, "fine": 0}[sys.argv[1]])
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.mark.parametrize("end", ["fine", "none", "three", "words", "KeyError"])
def test_streams_and_exit_code_are_those_of_a_fresh_one(end: str, program: Path) -> None:
    given = {"GIVEN": "5"}
    forked = run_forked(program, end, "a b", cwd=program.parent, env=given, stdin=b"typed")
    fresh = subprocess.run(
        [sys.executable, str(program), end, "a b"],
        cwd=program.parent,
        env=os.environ | given,
        input="typed",
        capture_output=True,
        text=True,
    )
    assert "typed" in fresh.stdout and fresh.stderr.startswith("complaint\n")
    assert (forked.returncode, forked.stdout) == (fresh.returncode, fresh.stdout)
    assert forked.stderr.splitlines()[0] == "complaint"
    assert forked.stderr.splitlines()[-1] == fresh.stderr.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals_end_it(number: signal.Signals, program: Path) -> None:
    process = start(program, "wait", env={"GIVEN": "5"})
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(number)
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == -number


def test_what_takes_too_long_is_killed(program: Path) -> None:
    process = start(program, "wait", env={"GIVEN": "5"})
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(timeout=0.5)
