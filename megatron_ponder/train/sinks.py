"""Sinks for the records of a run: metrics.jsonl, TensorBoard, Weights & Biases. Rank 0 only.

A record is a flat dict with `split` (train, valid, test) and `iteration`. On resume, metrics.jsonl
and TensorBoard drop records beyond the loaded iteration, so no record is lost or written twice.
"""

import importlib
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.errors import BackendError
from megatron_ponder.files import write_text

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
"""Megatron-LM's tag for each of our names; names that are not listed are used unchanged."""


class Sink(Protocol):
    """A destination of records."""

    def write(self, record: Record) -> None:
        """Store one record so that it survives a crash of the run."""

    def close(self) -> None:
        """Close the sink; no record follows."""


def open_sinks(config: ResolvedConfig, iteration: int) -> list[Sink]:
    """Open the sinks that the config requests.

    Args:
        config: resolved.
        iteration: the iteration that was loaded; 0 for a new run.

    Raises:
        BackendError: a requested library is not installed.
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
    """Writes one JSON object per line. A number that is not finite becomes null."""

    def __init__(self, path: Path, iteration: int) -> None:
        """Open `path` for appending, after dropping records beyond `iteration`."""
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _is_kept(line, iteration)]
            write_text(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a")

    def write(self, record: Record) -> None:
        """Append one line and flush it to the operating system."""
        self._file.write(json.dumps({k: _finite(v) for k, v in record.items()}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """Writes event files. Tags of validation and test have a suffix, as in Megatron-LM."""

    def __init__(self, folder: str, iteration: int) -> None:
        """Start an event file that purges the events of earlier files beyond `iteration`."""
        module = _import("torch.utils.tensorboard", needs="tensorboard", flag="--tensorboard-dir")
        self._writer = module.SummaryWriter(folder, purge_step=iteration + 1)

    def write(self, record: Record) -> None:
        """Write every number of a record."""
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
    """Logs to one W&B run."""

    def __init__(self, config: ResolvedConfig) -> None:
        """Start the W&B run, with our whole config as its config."""
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
    """Write a record to every sink."""
    for sink in sinks:
        sink.write(record)


def _is_kept(line: str, iteration: int) -> bool:
    """Whether a line is a complete record of an iteration up to `iteration`."""
    try:
        return bool(json.loads(line)["iteration"] <= iteration)
    except (ValueError, KeyError, TypeError):  # cut off by a crash
        return False


def _finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON lacks, by None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _import(module: str, *, needs: str, flag: str) -> Any:
    """Import a library that a flag needs."""
    if importlib.util.find_spec(needs) is None:
        raise BackendError(
            f"{flag} needs {needs}, which is not installed. Run pip install {needs}, or remove "
            f"{flag}."
        )
    return importlib.import_module(module)
