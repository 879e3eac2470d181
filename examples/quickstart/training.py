"""Runs training under torchrun and shows its progress in one line.

The log of the training goes to a file; the progress line is made from its metrics.jsonl.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from processes import StepFailed, run_logged

from megatron_ponder import log
from megatron_ponder.config.parse import parse_args

LATEST_FILE = "latest_checkpointed_iteration.txt"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """One model's training."""

    title: str
    """Name in the progress bar."""
    folder: Path
    """Checkpoints, metrics.jsonl and train.log."""
    flags: Sequence[str]
    """Flags of the run, without --save and --load."""
    num_processes: int
    """Number of ranks."""

    @property
    def log(self) -> Path:
        """The complete output of the training."""
        return self.folder / "train.log"

    @property
    def metrics(self) -> Path:
        """The metrics of the training."""
        return self.folder / "metrics.jsonl"

    def command(self) -> list[str]:
        """The command line. It resumes from its own checkpoint, if there is one."""
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        where = ["--save", str(self.folder), "--load", str(self.folder)]
        return [
            *launcher,
            *("--nproc-per-node", str(self.num_processes)),
            *("-m", "megatron_ponder.pretrain"),
            *self.flags,
            *where,
        ]


def train(run: TrainingRun, lock: int) -> str:
    """Train to the end, resuming from the run's checkpoint if there is one.

    Args:
        run: the training.
        lock: see `workflow.exclusive`.

    Returns:
        One line about the result.

    Raises:
        StepFailed: training failed or was stopped.
    """
    config = parse_args(run.flags, prog="quickstart")
    num_iterations = config.training.train_iters
    begun = stored_iteration(run.folder)
    if begun:
        print(f"    resuming from the checkpoint of iteration {begun}", flush=True)
    threads = {"OMP_NUM_THREADS": str(threads_per_rank(run.num_processes))}
    with log.progress(num_iterations, f"    {run.title}", " iterations", initial=begun) as bar:
        bar.set_postfix_str("starting")
        for _ in run_logged(run.command(), run.log, lock, environment=threads):
            records = read_metrics(run.metrics)
            reached = max((r["iteration"] for r in records if r["split"] == "train"), default=0)
            if reached > bar.n:
                bar.set_postfix_str(_newest(records), refresh=False)
                bar.update(reached - bar.n)
        stored = stored_iteration(run.folder)
        if stored < num_iterations:
            raise StepFailed(
                f"training was stopped at iteration {stored} of {num_iterations}. Repeat the same "
                f"command to resume. The log is {run.log}."
            )
        bar.set_postfix_str(_newest(read_metrics(run.metrics)), refresh=False)
        bar.update(num_iterations - bar.n)
    return _newest(read_metrics(run.metrics))


def stored_iteration(folder: Path) -> int:
    """Iteration of the newest checkpoint; 0 if there is none."""
    path = folder / LATEST_FILE
    return int(path.read_text()) if path.exists() else 0


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl, except a line that is still being written."""
    if not path.exists():
        return []
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def threads_per_rank(num_processes: int) -> int:
    """Cores divided by processes, at least 1."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // num_processes)


def _newest(records: Sequence[dict[str, Any]]) -> str:
    """The latest losses and speed, in words."""
    newest = {record["split"]: record for record in records}
    parts = []
    if "train" in newest:
        parts += [f"loss {newest['train']['lm_loss']:.3f}"]
    if "valid" in newest:
        parts += [f"validation {newest['valid']['lm_loss']:.3f}"]
    if "train" in newest:
        parts += [f"{newest['train']['tokens_per_s']:,.0f} tokens/s"]
    return ", ".join(parts)
