"""Where records of a run go: metrics.jsonl, TensorBoard, Weights & Biases. Rank 0 only.

A record is a flat dict with `split` (train, valid, test) and `iteration`. On resume each sink drops
what lies beyond the iteration that was loaded, so that no line is lost or written twice.
"""

import importlib
import importlib.util
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.errors import BackendError

METRICS_FILE = "metrics.jsonl"
Record = dict[str, Any]

TENSORBOARD_TAGS = {
    "lm_loss": "lm loss",
    "learning_rate": "learning-rate",
    "grad_norm": "grad-norm",
    "elapsed_ms_per_iteration": "iteration-time",
    "tflops_per_device": "throughput",
    "perplexity": "lm loss ppl",
}
"""Megatron-LM's names where it has them; other numbers keep ours."""


class Sink(Protocol):
    """Takes records."""

    def write(self, record: Record) -> None:
        """Store one record so that it survives a crash of the run."""

    def close(self) -> None:
        """Nothing more will come."""


def open_sinks(config: ResolvedConfig, iteration: int) -> list[Sink]:
    """The sinks that a run asks for.

    Args:
        config: resolved.
        iteration: the iteration that was loaded; 0 on a fresh start.

    Raises:
        BackendError: a library that was asked for is not installed.
    """
    sinks: list[Sink] = []
    if config.checkpoint.save is not None:
        sinks.append(JsonLines(Path(config.checkpoint.save, METRICS_FILE), iteration))
    if config.logging.tensorboard_dir is not None:
        sinks.append(TensorBoard(config.logging.tensorboard_dir, iteration))
    if config.logging.wandb_project is not None:
        sinks.append(WeightsAndBiases(config))
    return sinks


class JsonLines:
    """One JSON object per line; a number that is not finite is null."""

    def __init__(self, path: Path, iteration: int) -> None:
        """Open `path` for appending, after dropping records beyond `iteration`."""
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _is_kept(line, iteration)]
            pending = path.with_name(f".{path.name}.unfinished")
            pending.write_text("".join(f"{line}\n" for line in kept))
            os.replace(pending, path)
        self._file = path.open("a")

    def write(self, record: Record) -> None:
        """Append one line and hand it to the operating system."""
        self._file.write(json.dumps({k: _finite(v) for k, v in record.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Event files; validation and test get a suffix, as in Megatron-LM."""

    def __init__(self, folder: str, iteration: int) -> None:
        """Start an event file that hides what earlier ones hold beyond `iteration`."""
        module = _import("torch.utils.tensorboard", needs="tensorboard", flag="--tensorboard-dir")
        self._writer = module.SummaryWriter(folder, purge_step=iteration + 1)

    def write(self, record: Record) -> None:
        """Add every number of a record."""
        split, iteration = record["split"], record["iteration"]
        suffix = {"train": "", "valid": " validation", "test": " test"}[split]
        suffix += f" {record['dataset']}" if "dataset" in record else ""
        for name, value in record.items():
            if name != "iteration" and isinstance(value, int | float):
                tag = TENSORBOARD_TAGS.get(name, name.replace("_", "-"))
                self._writer.add_scalar(tag + suffix, value, iteration)
        self._writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        self._writer.close()


class WeightsAndBiases:
    """One W&B run."""

    def __init__(self, config: ResolvedConfig) -> None:
        """Start the run; its config is the whole run config."""
        wandb = _import("wandb", needs="wandb", flag="--wandb-project")
        self._run = wandb.init(
            project=config.logging.wandb_project,
            name=config.logging.wandb_exp_name,
            config=config.to_flat_dict(),
        )

    def write(self, record: Record) -> None:
        """Log every number of a record as split/name."""
        split = "/".join(record[key] for key in ("split", "dataset") if key in record)
        values = {f"{split}/{k}": v for k, v in record.items() if isinstance(v, int | float)}
        self._run.log(values, step=record["iteration"])

    def close(self) -> None:
        """Mark the run as finished."""
        self._run.finish()


def write_all(sinks: Sequence[Sink], record: Record) -> None:
    """Give a record to every sink."""
    for sink in sinks:
        sink.write(record)


def _is_kept(line: str, iteration: int) -> bool:
    """Whether a line is a whole record of an iteration that the run has behind it."""
    try:
        return bool(json.loads(line)["iteration"] <= iteration)
    except json.JSONDecodeError:  # cut off by a crash
        return False


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _import(module: str, *, needs: str, flag: str) -> Any:
    """Import a library that the user asked for by a flag."""
    if importlib.util.find_spec(needs) is None:
        raise BackendError(
            f"{flag} needs {needs}, which is not installed. Run pip install {needs}, or leave "
            f"{flag} out."
        )
    return importlib.import_module(module)
