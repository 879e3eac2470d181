"""What a checkpoint costs: how long a save stops training, its bytes, and the time to load.

One process builds the model, takes a step (so that the optimizer has its state) and saves as a run
does, which blocks until the checkpoint is published. The load goes into the same model and reads
files that are still in the system's cache. Left out: several ranks, which share the writing.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.commands import CheckpointOptions
from benchmarks.processes import Held, processes
from benchmarks.steps import build_ours, take_steps
from megatron_ponder.checkpoint.progress import Progress
from megatron_ponder.checkpoint.reader import load_checkpoint
from megatron_ponder.checkpoint.writer import save_checkpoint
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.schema import CheckpointConfig, RunConfig
from megatron_ponder.model.size import count_parameters


def measure(options: CheckpointOptions, config: RunConfig) -> dict[str, Any]:
    """Save and load.

    Args:
        options: how often, and where.
        config: as given; resolved here for one process.

    Raises:
        PonderError: the settings cannot work.
    """
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="checkpoints-") as folder:
        checkpoint = CheckpointConfig(save=folder, load=folder, keep_checkpoints=1)
        config = resolve(dataclasses.replace(config, checkpoint=checkpoint), world_size=1)
        with processes("ours") as ours:
            ours.run(build_ours, "ours", config)
            ours.run(take_steps, "ours", 1, 1)
            ((_, step_s, _),) = ours.run(take_steps, "ours", 2, 1)
            ((saves, num_bytes),) = ours.run(save_repeatedly, options.saves)
            (load_s,) = ours.run(load_once)
    stall_s = statistics.median(saves)
    parameters = count_parameters(config.model).total
    return report.environment(config) | {
        "parameters": parameters,
        "bytes": num_bytes,
        "bytes_per_parameter": num_bytes / parameters,
        "stall_s": stall_s,
        "stall_s_of_saves": saves,
        "save_mb_per_s": num_bytes / stall_s / 1e6,
        "load_s": load_s,
        "load_mb_per_s": num_bytes / load_s / 1e6,
        "ms_per_step": 1e3 * step_s,
        "stall_in_steps": stall_s / step_s,
    }


def save_repeatedly(held: Held, num_saves: int) -> tuple[list[float], int]:
    """In the process: seconds of each save, and bytes of the last checkpoint."""
    seconds: list[float] = []
    training_state = held["ours"].training_state
    for iteration in range(1, num_saves + 1):
        begin_s = time.perf_counter()
        folder = save_checkpoint(
            held["ours"].config,
            chunks=training_state.model.chunks,
            optimizer=training_state.optimizer,
            scheduler=training_state.scheduler,
            progress=Progress(iteration=iteration),
        )
        seconds.append(time.perf_counter() - begin_s)
    return seconds, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def load_once(held: Held) -> float:
    """In the process: seconds to load the checkpoint."""
    config, training_state = held["ours"].config, held["ours"].training_state
    (folder,) = Path(config.checkpoint.load).glob("iter_*")
    begin_s = time.perf_counter()
    load_checkpoint(
        config,
        folder,
        chunks=training_state.model.chunks,
        optimizer=training_state.optimizer,
        scheduler=training_state.scheduler,
    )
    return time.perf_counter() - begin_s


def as_text(result: dict[str, Any]) -> str:
    """A result in sentences."""
    saves = ", ".join(f"{s:.2f} s" for s in result["stall_s_of_saves"])
    return (
        f"{report.heading(result)}\n\n"
        f"checkpoint: {result['bytes'] / 1e6:,.1f} MB, {result['parameters']:,} parameters, "
        f"{result['bytes_per_parameter']:.1f} bytes each\n"
        f"save: training stops for {result['stall_s']:.2f} s "
        f"({result['save_mb_per_s']:,.0f} MB/s), as long as {result['stall_in_steps']:.1f} steps "
        f"of {result['ms_per_step']:.0f} ms; each save: {saves}\n"
        f"load: {result['load_s']:.2f} s ({result['load_mb_per_s']:,.0f} MB/s)"
    )
