"""What a checkpoint costs: how long training stands still for a save, bytes, and the time to load.

A process of one rank builds the model, takes a step (so that the optimizer has its state), and
saves as a run does: the loop is blocked until the checkpoint is published. The load goes into the
same model; the files are fresh, so that it reads what the system still has in memory, not the disk.
Left out: several ranks, which share the writing, and file systems other than that of --folder.
"""

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.options import CheckpointBenchmarkOptions
from benchmarks.process import side
from benchmarks.steps import OurSteps
from benchmarks.train import environment
from megatron_ponder.checkpoint.progress import Progress
from megatron_ponder.checkpoint.reader import load_checkpoint
from megatron_ponder.checkpoint.writer import save_checkpoint
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.schema import CheckpointConfig, RunConfig
from megatron_ponder.model.size import count_parameters


def benchmark_checkpoint(options: CheckpointBenchmarkOptions, config: RunConfig) -> dict[str, Any]:
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
        with side("ours", "none", config) as ours:
            _, step_s, _ = ours.ask("take_steps", 1)
            _, step_s, _ = ours.ask("take_steps", 1)
            saves, num_bytes = ours.ask("save_checkpoints", options.saves)
            load_s = ours.ask("load_checkpoint")
    stall_s = statistics.median(saves)
    parameters = count_parameters(config.model).total
    return environment(config) | {
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


def save_repeatedly(steps: OurSteps, num_saves: int) -> tuple[list[float], int]:
    """In the process: seconds of each save, and bytes of the last checkpoint."""
    seconds: list[float] = []
    training_state = steps.training_state
    for iteration in range(1, num_saves + 1):
        begin_s = time.perf_counter()
        folder = save_checkpoint(
            steps.config,
            chunks=training_state.model.chunks,
            optimizer=training_state.optimizer,
            scheduler=training_state.scheduler,
            progress=Progress(iteration=iteration),
        )
        seconds.append(time.perf_counter() - begin_s)
    return seconds, sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def load_once(steps: OurSteps) -> float:
    """In the process: seconds to go on from the checkpoint that is there."""
    checkpoint = steps.config.checkpoint
    assert checkpoint.load is not None
    (folder,) = Path(checkpoint.load).glob("iter_*")
    training_state = steps.training_state
    begin_s = time.perf_counter()
    load_checkpoint(
        steps.config,
        folder,
        chunks=training_state.model.chunks,
        optimizer=training_state.optimizer,
        scheduler=training_state.scheduler,
    )
    return time.perf_counter() - begin_s


def as_text(result: dict[str, Any]) -> str:
    """The figures of `benchmark_checkpoint` for people."""
    return "\n".join(
        [
            f"{result['device']}, {result['threads']} threads, torch {result['versions']['torch']}"
            f", megatron-core {result['versions']['megatron_core']}, {result['date']}",
            "",
            f"checkpoint: {result['bytes'] / 1e6:,.1f} MB, {result['parameters']:,} parameters, "
            f"{result['bytes_per_parameter']:.1f} bytes each",
            f"save: training stands still for {result['stall_s']:.2f} s "
            f"({result['save_mb_per_s']:,.0f} MB/s), as long as {result['stall_in_steps']:.1f} "
            f"steps of {result['ms_per_step']:.0f} ms; each save: "
            + ", ".join(f"{s:.2f} s" for s in result["stall_s_of_saves"]),
            f"load: {result['load_s']:.2f} s ({result['load_mb_per_s']:,.0f} MB/s)",
        ]
    )
