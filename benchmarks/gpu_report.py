"""Everything that wants to be known on the first GPU that one meets, in one command.

Runs the parts of `gpu_parts` one after the other, each in a process of its own: one that crashes,
or takes longer than the budget has left, is recorded and the others go on. What a part gave is kept
in the report's folder as soon as it is there, so that a report that was interrupted goes on where
it was; a part is run again if it failed or its command has changed. The findings are written anew
after every part (`gpu_findings`).
"""

import dataclasses
import json
import logging
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import Part, build_parts
from megatron_ponder.errors import BackendError, ConfigError

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parents[1]
OUT_OF_MEMORY = ("out of the device's memory", "out of memory")
TAIL_CHARACTERS = 4000
LOOK_S = 120.0
PATIENCE, START_MINUTES = 3, 2
"""A part that takes so many times as long as it said, and as long to start, is ended."""
ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""For all parts: lengths differ between passes, which fragments memory."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuReportOptions:
    """How long, where to, and whether really."""

    folder: str = "runs/gpu_report"
    """Report and the results of its parts; a report that is there is continued."""
    budget_minutes: float = 60.0
    """Time that may be spent now. Parts for which it is not enough are left out."""
    parts: tuple[str, ...] = ()
    """Names of parts to run, as --dry-run prints them. None: all, in order of importance."""
    dry_run: bool = False
    """Print the plan with its commands, and run nothing."""
    allow_cpu: bool = False
    """Go on without a GPU; needs --tiny."""
    tiny: bool = False
    """Tiny models: tries the report itself in minutes."""

    def __post_init__(self) -> None:
        """Refuse what does not go together.

        Raises:
            ConfigError: no time, or models for which a CPU would take days.
        """
        if not self.budget_minutes > 0:
            raise ConfigError(f"--budget-minutes {self.budget_minutes}: must be above 0.")
        if self.allow_cpu and not self.tiny:
            raise ConfigError("--allow-cpu needs --tiny: the models are too large for a CPU.")


def run_report(options: GpuReportOptions) -> bool:
    """Run what is not there yet.

    Returns:
        Whether every part that was asked for has a result now.

    Raises:
        BackendError: there is no GPU.
        ConfigError: no part has the name.
    """
    folder = Path(options.folder).resolve()
    parts = _wanted(options, _build(options, folder))
    if options.dry_run:
        print(_describe(parts, folder))
        return True
    _require_gpu(options)
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    _look_at_machine(options, folder)
    parts = _wanted(options, _build(options, folder))  # with the memory that the device has
    run_parts(options, parts, folder)
    return all(_kept(part, folder) is not None for part in parts)


def _look_at_machine(options: GpuReportOptions, folder: Path) -> None:
    """Describe the machine anew; results of two devices do not go into one report.

    Raises:
        ConfigError: the folder has the report of another device.
    """
    before = _device_in(folder)
    machine = _build(options, folder)[0]
    if before is None:
        _run_part(machine, folder, options.budget_minutes)
        return
    result = _run_command(machine.commands[0], machine.prints_json, LOOK_S)
    now = result["output"]["capabilities"]["device_name"] if result["status"] == "ok" else None
    if now != before:
        raise ConfigError(
            f"--folder {options.folder} has the report of a {before}; this is {now or 'no GPU'}. "
            "Give another folder."
        )


def _device_in(folder: Path) -> str | None:
    """The device of a report that is there."""
    machine = read_results(folder).get("machine")
    if machine is None or machine["status"] != "ok":
        return None
    return machine["output"]["capabilities"]["device_name"]


def run_parts(options: GpuReportOptions, parts: list[Part], folder: Path) -> None:
    """Those without a result, as long as there is time; findings are written after each."""
    from benchmarks.gpu_findings import write_findings

    begin_s = time.monotonic()
    write_findings(folder)
    for number, part in enumerate(parts, 1):
        if _kept(part, folder) is not None:
            logger.info("[%d/%d] %s: there already", number, len(parts), part.name)
            continue
        spent = (time.monotonic() - begin_s) / 60
        left = options.budget_minutes - spent
        if part.minutes > left:
            logger.info(
                "[%d/%d] %s: left out, takes about %.1f min and %.1f are left",
                *(number, len(parts), part.name, part.minutes, left),
            )
            continue
        open_minutes = sum(p.minutes for p in parts[number - 1 :] if _kept(p, folder) is None)
        logger.info(
            "[%d/%d] %s: about %.1f min; %.1f of %.1f min spent, all parts end in about %.1f",
            *(number, len(parts), part.name, part.minutes),
            *(spent, options.budget_minutes, min(open_minutes, left)),
        )
        result = _run_part(part, folder, min(left, PATIENCE * part.minutes + START_MINUTES))
        logger.info("    %s in %.1f min", result["status"], result["seconds"] / 60)
        write_findings(folder)
    logger.info("report: %s", folder / "report.md")


def _build(options: GpuReportOptions, folder: Path) -> list[Part]:
    """All parts, for the device's memory as far as it is known."""
    machine = read_results(folder).get("machine", {}).get("output") or {}
    return build_parts(
        folder=str(folder), is_tiny=options.tiny, memory_gib=machine.get("memory_gib")
    )


def _wanted(options: GpuReportOptions, parts: list[Part]) -> list[Part]:
    """Those that were asked for."""
    unknown = set(options.parts) - {part.name for part in parts}
    if unknown:
        known = ", ".join(part.name for part in parts)
        raise ConfigError(f"--parts {' '.join(sorted(unknown))}: parts are {known}.")
    return [part for part in parts if not options.parts or part.name in options.parts]


def _require_gpu(options: GpuReportOptions) -> None:
    """Refuse a machine without a device.

    Raises:
        BackendError: there is none.
    """
    import torch

    if not torch.cuda.is_available() and not options.allow_cpu:
        built = torch.version.cuda or "no CUDA"
        raise BackendError(
            f"no CUDA device: torch {torch.__version__} (built for {built}) sees none. Run this on "
            "a machine with a GPU; --dry-run prints what it would run, --allow-cpu --tiny tries "
            "the report itself."
        )


def _describe(parts: list[Part], folder: Path) -> str:
    """The plan."""
    lines = [f"{len(parts)} parts, about {sum(p.minutes for p in parts):.0f} min, in {folder}"]
    for number, part in enumerate(parts, 1):
        state = "" if _kept(part, folder) is None else ", there already"
        lines += ["", f"[{number}] {part.name}: about {part.minutes:g} min{state}"]
        for position, command in enumerate(part.commands):
            lines.append("    " + ("" if position == 0 else "or ") + shlex.join(command))
    return "\n".join(lines)


def _run_part(part: Part, folder: Path, minutes: float) -> dict[str, Any]:
    """Run it, unless its result is there; keep what it gave."""
    kept = _kept(part, folder)
    if kept is not None:
        return kept
    begin_s, result = time.monotonic(), dict[str, Any]()
    for command in part.commands:
        left_s = minutes * 60 - (time.monotonic() - begin_s)
        result = _run_command(command, part.prints_json, left_s)
        if not result["is_out_of_memory"]:
            break
    result |= {
        "name": part.name,
        "commands": [list(command) for command in part.commands],
        "seconds": time.monotonic() - begin_s,
    }
    write_json(result, folder / "parts" / f"{part.name}.json")
    return result


def _run_command(command: tuple[str, ...], prints_json: bool, limit_s: float) -> dict[str, Any]:
    """Run one command from the project's root; everything it started ends with it."""
    environment = {**os.environ, **ENVIRONMENT}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=max(limit_s, 1.0))
        status = "ok" if process.returncode == 0 else "failed"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        status = "out of time"
    finally:
        if process.poll() is None:  # interrupted
            os.killpg(process.pid, signal.SIGKILL)
    output: Any = stdout[-TAIL_CHARACTERS:]
    if status == "ok" and prints_json:
        output = _json_in(stdout)
        status = "failed" if output is None else "ok"
    return {
        "status": status,
        "exit_code": process.returncode,
        "command": list(command),
        "output": output,
        "stderr": stderr[-TAIL_CHARACTERS:],
        "is_out_of_memory": status == "failed" and any(words in stderr for words in OUT_OF_MEMORY),
    }


def _json_in(text: str) -> Any:
    """The JSON object in a text, behind what libraries may have printed; None: there is none."""
    start = text.find("{\n")
    try:
        return json.loads(text[start:])
    except json.JSONDecodeError:
        return None


def _kept(part: Part, folder: Path) -> dict[str, Any] | None:
    """The result of a part that has ended well with these commands."""
    result = read_results(folder).get(part.name)
    if result is None or result["status"] != "ok":
        return None
    asked = [list(command) for command in part.commands]
    return result if result["command"] in asked else None


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """What the parts in a report's folder gave, by name."""
    results = (json.loads(path.read_text()) for path in sorted(folder.glob("parts/*.json")))
    return {result["name"]: result for result in results}


def write_json(value: Any, path: Path) -> None:
    """Write under a temporary name and rename."""
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(value, indent=1) + "\n")
    unfinished.replace(path)
