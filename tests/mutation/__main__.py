"""Draws mutations of the package at random and says which of them the tests catch.

    python -m tests.mutation --count 60 --seed 1 --record runs/mutations.jsonl

Each mutation is made in a worktree of the current commit. The tests nearest to the mutated file run
first, up to the first failure; with --all, mutations that survive meet the rest of the tests that
can reach the file. A test that hangs counts as failed. Results are kept in the record, so that a
campaign can be interrupted and resumed on the same commit; --report prints the record as a table.
Needs the extra `mutation`. Campaigns and their survivors: docs/benchmarks/*-mutations.md.
"""

import argparse
import dataclasses
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.mutation.drawing import Mutation, draw
from tests.mutation.reach import PACKAGE, Reach

ROOT = Path(__file__).parents[2]
FAILURE = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - (.*))?$", re.MULTILINE)
STARTED = re.compile(r"^(tests/\S+)", re.MULTILINE)
NO_FAILURE = (0, 5)
"""pytest's exit codes: all passed; no test was selected."""
Record = dict[str, Any]


def run_tests(mutation: Mutation, worktree: Path, tests: list[str], options: Any) -> Record:
    """Run tests on a mutation, up to the first failure.

    Returns:
        `killed_by`: the failed test, or None; `why`: its error; `seconds`.
    """
    path = worktree / mutation.path
    before = path.read_text()
    path.write_text(mutation.code(worktree))
    command = [sys.executable, "-m", "pytest", "-x", "-v", "--tb=line", "-m", "not slow"]
    command += ["-p", "no:cacheprovider", f"--timeout={options.limit_s}", *tests]
    environment = {**os.environ, "PYTHONPATH": f"{worktree}:{os.environ.get('PYTHONPATH', '')}"}
    start_s = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=worktree,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = process.communicate(timeout=options.budget_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        output, _ = process.communicate()
        return {"killed_by": None, "why": "stopped at --budget-s", "seconds": options.budget_s}
    finally:
        path.write_text(before)
    seconds = round(time.monotonic() - start_s)
    if process.returncode in NO_FAILURE:
        return {"killed_by": None, "why": "", "seconds": seconds}
    found = FAILURE.search(output)
    if found is None:  # it ended without a summary: a time limit, or a crash
        killed_by, why = (STARTED.findall(output) or ["collection"])[-1], output[-400:]
    else:
        killed_by, why = found[1], (found[2] or "")[:400]
    return {"killed_by": killed_by, "why": why, "seconds": seconds}


@contextmanager
def worktrees(count: int, commit: str) -> Iterator["queue.Queue[Path]"]:
    """Checkouts of a commit, each for one mutation at a time."""
    free: queue.Queue[Path] = queue.Queue()
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"worktree{number}") for number in range(count)]
        try:
            for path in paths:
                _git("worktree", "add", "--quiet", "--detach", str(path), commit)
                free.put(path)
            yield free
        finally:
            for path in paths:
                _git("worktree", "remove", "--force", str(path))


def campaign(options: argparse.Namespace) -> None:
    """Draw, test, keep."""
    mutations = draw(ROOT, PACKAGE, options.count, options.seed)
    reach, commit = Reach(ROOT), _git("rev-parse", "HEAD").strip()
    known = {record["number"]: record for record in read(options.record)}
    lock = threading.Lock()

    def run(number: int, mutation: Mutation, stage: str) -> None:
        before = known.get(number, {"stage": None, "killed_by": None})
        near, far = reach.tests_of(mutation.path)
        tests = {"near": near, "all": far, "chosen": options.tests}[stage]
        is_done = stage != "chosen" and before["stage"] and stage in ("near", before["stage"])
        if before["killed_by"] or is_done:
            return
        worktree = free.get()
        record = {"number": number, **dataclasses.asdict(mutation), "commit": commit}
        record |= {"diff": mutation.diff(worktree), "stage": stage}
        record |= {"killed_by": None, "why": "", "seconds": 0}
        record |= run_tests(mutation, worktree, tests, options) if tests else {}
        free.put(worktree)
        with lock, options.record.open("a") as file:
            known[number] = record
            file.write(json.dumps(record) + "\n")
            print(number, mutation.path, mutation.line, stage, record["killed_by"], flush=True)

    with worktrees(options.workers, commit) as free, ThreadPoolExecutor(options.workers) as pool:
        stages = ("chosen",) if options.tests else ("near", "all") if options.all else ("near",)
        for stage in stages:
            chosen = [n for n in range(options.count) if not options.only or n in options.only]
            list(pool.map(lambda n: run(n, mutations[n], stage), chosen))  # noqa: B023


def report(path: Path) -> str:
    """The record as a Markdown table; a `note` written into it by hand stands behind "survived"."""
    records = sorted(read(path), key=lambda record: record["number"])
    killed = sum(record["killed_by"] is not None for record in records)
    lines = [f"{killed} of {len(records)} are killed.", ""]
    lines += ["| | file, line | operator | change | killed by |", "|---|---|---|---|---|"]
    for record in records:
        change = " ".join(f"`{line[0]} {line[1:].strip()}`" for line in record["diff"])
        place = f"{record['path'].removeprefix(PACKAGE + '/')}, {record['line']}"
        verdict = record["killed_by"] or f"**survived** {record.get('note', '')}"
        killed_by = verdict.strip().removeprefix("tests/")
        cells = (str(record["number"]), place, record["operator"].removeprefix("core/"), change)
        lines.append("| " + " | ".join(c.replace("|", "\\|") for c in (*cells, killed_by)) + " |")
    return "\n".join(lines) + "\n"


def read(path: Path) -> list[Record]:
    """The last record of each mutation."""
    lines = path.read_text().splitlines() if path.exists() else []
    return list({record["number"]: record for record in map(json.loads, lines)}.values())


def _git(*arguments: str) -> str:
    return subprocess.check_output(["git", *arguments], cwd=ROOT, text=True)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation")
    parser.add_argument("--count", type=int, default=60, help="mutations to draw")
    parser.add_argument("--seed", type=int, default=1, help="of the draw")
    parser.add_argument("--record", type=Path, default=ROOT / "runs/mutations.jsonl")
    parser.add_argument("--all", action="store_true", help="run more than the nearest tests")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of mutations to test")
    parser.add_argument("--tests", nargs="*", help="tests to run, in place of those that are found")
    parser.add_argument("--workers", type=int, default=1, help="mutations tested at once")
    parser.add_argument("--limit-s", type=int, default=300, help="seconds for one test")
    parser.add_argument("--budget-s", type=int, default=3600, help="seconds for one mutation")
    parser.add_argument("--list", action="store_true", help="print the mutations and run nothing")
    parser.add_argument("--report", action="store_true", help="print the record as a table")
    options = parser.parse_args()
    options.record.parent.mkdir(parents=True, exist_ok=True)
    if options.report:
        print(report(options.record))
    elif options.list:
        for number, mutation in enumerate(draw(ROOT, PACKAGE, options.count, options.seed)):
            print(number, f"{mutation.path}:{mutation.line}", mutation.operator)
            print("\n".join(mutation.diff(ROOT)))
    else:
        campaign(options)


if __name__ == "__main__":
    main()
