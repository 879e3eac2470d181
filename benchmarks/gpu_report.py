"""Runs the commands of `gpu_commands` one by one within a budget, and reports what they printed.

A command that crashes or exceeds its time is recorded and the next one runs. One that runs out of
memory is tried again with a smaller micro-batch. Output, errors, record and status of a step are in
the report's folder as soon as it ends, and the report is rewritten. A report that was interrupted
is resumed: a step runs if it has no result with its commands on this device.
"""

import dataclasses
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_commands import (
    BACKENDS,
    FP8_MFU,
    MFU,
    MODELS,
    SPEEDUP,
    TARGETS,
    Step,
    build_steps,
)
from benchmarks.report import new_panels, table
from megatron_ponder.config.presets import PRESETS
from megatron_ponder.errors import BackendError, ConfigError
from megatron_ponder.figures import save_png
from megatron_ponder.files import write_json, write_text

logger = logging.getLogger("megatron_ponder.gpu_report")

ROOT = Path(__file__).resolve().parents[1]
OUT_OF_MEMORY = ("out of the device's memory", "out of memory")
PATIENCE, START_MINUTES = 3, 2
"""A step is killed after so many times its expected minutes, plus the time to start."""
STDERR_LINES = 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuReportOptions:
    """How long, and where to."""

    folder: str = "runs/gpu_report"
    """Folder of the report and of its results; an existing report is resumed."""
    budget_minutes: float = 60.0
    """Time to spend now. Steps that would take longer than what is left are skipped."""
    parts: tuple[str, ...] = ()
    """Names of steps to run, as --dry-run prints them. None: all, in order of importance."""
    dry_run: bool = False
    """Print the commands and run nothing."""
    allow_cpu: bool = False
    """Run without a GPU; needs --tiny."""
    tiny: bool = False
    """Tiny models: tries the report itself in minutes."""

    def __post_init__(self) -> None:
        """Check the combination.

        Raises:
            ConfigError: no time, or models for which a CPU would take days.
        """
        if not self.budget_minutes > 0:
            raise ConfigError(f"--budget-minutes {self.budget_minutes}: must be above 0.")
        if self.allow_cpu and not self.tiny:
            raise ConfigError("--allow-cpu needs --tiny: the models are too large for a CPU.")


def run_report(options: GpuReportOptions) -> bool:
    """Run the steps that have no result.

    Returns:
        Whether every step that was asked for has a result now.

    Raises:
        BackendError: there is no GPU.
        ConfigError: no step has the name.
    """
    folder = Path(options.folder).resolve()
    device, memory_gib = _find_device(options)
    steps = build_steps(folder, memory_gib, options.tiny)
    unknown = set(options.parts) - {step.name for step in steps}
    if unknown:
        known = ", ".join(step.name for step in steps)
        raise ConfigError(f"--parts {' '.join(sorted(unknown))}: parts are {known}.")
    steps = [step for step in steps if not options.parts or step.name in options.parts]
    if options.dry_run:
        print(f"{len(steps)} steps, about {sum(s.minutes for s in steps):.0f} min, in {folder}")
        for step in steps:
            print(f"\n{step.name}: about {step.minutes:g} min")
            print(*(f"    {shlex.join(command)}" for command in step.commands), sep="\n")
        return True
    return run_steps(steps, folder, device, options.budget_minutes)


def _find_device(options: GpuReportOptions) -> tuple[str, float]:
    """Name and memory in GiB; asked in a process of its own, which frees the device when it ends.

    Raises:
        BackendError: there is none, and one is needed.
    """
    ask = "import torch; p = torch.cuda.get_device_properties(0); print(p.name, p.total_memory)"
    asked = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    if asked.returncode == 0:
        name, memory = asked.stdout.rsplit(maxsplit=1)
        return name, int(memory) / (1 << 30)
    if options.dry_run or options.allow_cpu:
        return "no GPU", 0.0
    raise BackendError(
        f"no CUDA device: torch says {asked.stderr.strip().splitlines()[-1]!r}. Run this on a "
        "machine with a GPU; --dry-run prints the commands, --allow-cpu --tiny tries the report."
    )


def run_steps(steps: list[Step], folder: Path, device: str, budget_minutes: float) -> bool:
    """Run those without a result as long as there is time; whether all have one then."""
    begin_s = time.monotonic()
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    for number, step in enumerate(steps, 1):
        name = f"[{number}/{len(steps)}] {step.name}"
        left = budget_minutes - (time.monotonic() - begin_s) / 60
        if _has_result(step, folder, device):
            logger.info("%s: has a result", name)
        elif step.minutes > left:
            logger.info("%s: skipped, %.1f min needed, %.1f left", name, step.minutes, left)
        else:
            logger.info("%s: about %.1f min; %.1f min left", name, step.minutes, left)
            limit = min(left, PATIENCE * step.minutes + START_MINUTES)
            status = _run_step(step, folder, time.monotonic() + 60 * limit) | {"device": device}
            write_json(folder / f"parts/{step.name}.status", status)
            logger.info("    %s in %.1f min", status["status"], status["minutes"])
        write_report(folder)
    logger.info("report: %s", folder / "report.md")
    return all(_has_result(step, folder, device) for step in steps)


def read_statuses(folder: Path) -> dict[str, dict[str, Any]]:
    """The status of each step that has ended, in the order of their ends."""
    paths = sorted(folder.glob("parts/*.status"), key=lambda path: path.stat().st_mtime)
    return {path.stem: json.loads(path.read_text()) for path in paths}


def _has_result(step: Step, folder: Path, device: str) -> bool:
    """Whether it has succeeded with one of these commands on this device."""
    status = read_statuses(folder).get(step.name)
    return status is not None and (
        (status["status"], status["device"]) == ("ok", device)
        and status["command"] in step.commands
    )


def _run_step(step: Step, folder: Path, deadline_s: float) -> dict[str, Any]:
    """Run its commands until one does not run out of memory."""
    begin_s = time.monotonic()
    output, errors = (folder / f"parts/{step.name}.{suffix}" for suffix in ("txt", "err"))
    for command in step.commands:
        with output.open("w") as out, errors.open("w") as err:
            status, code = _run_command(command, out, err, deadline_s)
        said = errors.read_text(errors="replace")
        if status != "failed" or not any(words in said for words in OUT_OF_MEMORY):
            break
    minutes = (time.monotonic() - begin_s) / 60
    return {"status": status, "exit_code": code, "command": command, "minutes": minutes}


def _run_command(command: list[str], out: Any, err: Any, deadline_s: float) -> tuple[str, int]:
    """Status and exit code of a command run from the project's root."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # Lengths differ between passes, which fragments memory.
    memory = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    environment = {**os.environ, **memory, "PYTHONPATH": path}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        start_new_session=True,
    )
    try:
        code = process.wait(max(deadline_s - time.monotonic(), 1.0))
        return ("failed" if code else "ok"), code
    except subprocess.TimeoutExpired:
        return "out of time", -signal.SIGKILL
    finally:
        if process.poll() is None:  # out of time, or interrupted
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def write_report(folder: Path) -> None:
    """Write report.md, report.json and the picture from the results that exist."""
    statuses = read_statuses(folder)
    records = {
        name: json.loads(path.read_text())
        for name, status in statuses.items()
        if status["status"] == "ok" and (path := folder / f"parts/{name}.json").exists()
    }
    runs = training_runs(records)
    targets = list(check_targets(runs))
    write_json(folder / "report.json", {"targets": targets, "runs": runs, "records": records})
    ends = [
        (name, *(s[k] for k in ("status", "minutes", "device"))) for name, s in statuses.items()
    ]
    sections = {
        "Targets": table(list(targets[0]), [list(row.values()) for row in targets]),
        "Steps": table(("step", "status", "min", "device"), ends),
    }
    if runs:
        sections["Training"] = table(list(runs[0]), [list(row.values()) for row in runs])
        _draw(runs, folder / "training.png")
    for name, status in statuses.items():
        text = f"$ {shlex.join(status['command'])}\n"
        text += (folder / f"parts/{name}.txt").read_text(errors="replace").rstrip()
        if status["status"] != "ok":
            errors = (folder / f"parts/{name}.err").read_text(errors="replace").rstrip()
            text += f"\nexit code {status['exit_code']}\n"
            text += "\n".join(errors.splitlines()[-STDERR_LINES:])
        sections[f"{name}: {status['status']}"] = text
    parts = [f"## {title}\n\n```\n{text}\n```\n" for title, text in sections.items()]
    write_text(folder / "report.md", "\n".join(["# GPU report\n", *parts]))


def training_runs(records: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each model and backend that was trained.

    The speedup is over the reference in the same run where it had one, else over the reference of
    the report's other run of the model.
    """
    rows = []
    for model, (preset, _) in MODELS.items():
        base = records.get(f"train-{model}")
        for backend in ("default", *BACKENDS):
            record = base if backend == "default" else records.get(f"train-{model}-{backend}")
            if record is None:
                continue
            ours, config = record["ours"], record["config"]
            shape = ("num_layers", "hidden_size", "vocab_size")
            speedup = base and ours["tokens_per_s"] / base["reference"]["tokens_per_s"]
            rows.append(
                {
                    "model": model,
                    "backend": backend,
                    "micro_batch": config["micro_batch_size"],
                    **{k: ours[k] for k in ("ms_per_step", "tokens_per_s", "tflops", "mfu")},
                    "peak_gib": ours["peak_memory_gib"],
                    "speedup": record["speedup"]["median"] if "speedup" in record else speedup,
                    "is_whole_model": all(config[k] == PRESETS[preset][k] for k in shape),
                }
            )
    return rows


def check_targets(runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Each target, the best that was measured, and whether it is met (None: not measured)."""
    for model, targets in TARGETS.items():
        for what, target in targets.items():
            key = "speedup" if what == SPEEDUP else "mfu"
            candidates = [
                run
                for run in runs
                if run["model"] == model
                and run["is_whole_model"]
                and (run["backend"] == "fp8") == (what == FP8_MFU)
                and run[key] is not None
            ]
            best = max(candidates, key=lambda run: run[key], default=None)
            yield {
                "model": model,
                "what": what,
                "target": target,
                "found": best and best[key],
                "backend": best and best["backend"],
                "is_met": best and best[key] >= target,
            }


def _draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Bars of MFU, or of tokens/s over the reference's where it is unknown; lines are targets."""
    key, what = ("mfu", MFU) if any(run["mfu"] for run in runs) else ("speedup", SPEEDUP)
    models = sorted({run["model"] for run in runs})
    figure, panels = new_panels(len(models))
    for axes, model in zip(panels, models, strict=True):
        bars = {run["backend"]: run[key] or 0.0 for run in runs if run["model"] == model}
        axes.bar(list(bars), list(bars.values()), color="#d97706")
        axes.axhline(TARGETS[model][what], color="#111827", linestyle="--", linewidth=1)
        axes.set(title=f"{model} (line: target)", ylabel=what)
        axes.tick_params(axis="x", rotation=30)
    save_png(figure, path)
