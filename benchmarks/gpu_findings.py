"""What a GPU report found: report.md, report.json and pictures, from the results of its parts.

Written anew from whatever results there are, so that a report that was interrupted is readable.
Ratios to the reference are of one run where both sides were in it; those of other backends compare
with the reference of the same report, on the same device, in another process.
"""

import datetime
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.generate import as_text as generation_as_text
from benchmarks.gpu_parts import MODELS, VARIANTS
from benchmarks.gpu_report import read_results, write_json
from benchmarks.kernels import as_text as kernels_as_text
from benchmarks.report import roofline_lines, save_png
from megatron_ponder.config.presets import PRESETS

Results = dict[str, dict[str, Any]]
OURS, FLOOR, TARGET = "#d97706", "#9ca3af", "#111827"
STDERR_LINES = 6


def write_findings(folder: Path) -> None:
    """Write the report of the results that there are."""
    results = read_results(folder)
    runs = training_runs(results)
    targets = list(check_targets(runs))
    write_json({"targets": targets, "runs": runs, "parts": results}, folder / "report.json")
    pictures = _draw(runs, results, folder)
    sections = [
        _head(results),
        _targets(targets),
        _training(runs),
        [line for name in pictures for line in (f"![{name}]({name})", "")],
        *(_passes(results, name) for name in MODELS),
        *(_kernels(results, name) for name in MODELS),
        _checkpoints(results),
        _generation(results),
        _words(results, "tests", "Tests"),
        _words(results, "doctor", "What a run would use here"),
        _problems(results),
        _commands(results),
    ]
    text = "\n".join("\n".join([*lines, ""]) for lines in sections if lines)
    unfinished = folder / ".report.md"
    unfinished.write_text(text)
    unfinished.replace(folder / "report.md")


def training_runs(results: Results) -> list[dict[str, Any]]:
    """One row for each model and backend that was trained."""
    rows = []
    for model in MODELS:
        base = _output(results, f"train-{model}")
        for variant in (None, *VARIANTS):
            name = f"train-{model}" + (f"-{variant}" if variant else "")
            found = _output(results, name)
            if found is None:
                continue
            ours = found["ours"]
            speedup, is_same_run = None, False
            if "speedup" in found:
                speedup, is_same_run = found["speedup"]["median"], True
            elif base is not None:
                speedup = ours["tokens_per_s"] / base["reference"]["tokens_per_s"]
            rows.append(
                {
                    "model": model,
                    "backend": variant or "default",
                    "device": found["device"],
                    "micro_batch_size": found["config"]["micro_batch_size"],
                    "is_whole_model": _is_whole(found["config"], MODELS[model].preset),
                    "speedup": speedup,
                    "is_same_run": is_same_run,
                    **{key: ours[key] for key in ("ms_per_step", "tokens_per_s", "tflops", "mfu")},
                    "peak_memory_gib": ours["peak_memory_gib"],
                }
            )
    return rows


def check_targets(runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What the project wants, what was found, and whether that is enough."""
    for name, model in MODELS.items():
        of_model = [run for run in runs if run["model"] == name and run["is_whole_model"]]
        in_bf16 = [run for run in of_model if run["backend"] != "fp8"]
        in_fp8 = [run for run in of_model if run["backend"] == "fp8"]
        wanted = (
            ("MFU", "mfu", model.target.mfu, in_bf16),
            ("MFU with fp8 linears", "mfu", model.target.fp8_mfu, in_fp8),
            ("tokens/s over the reference's", "speedup", model.target.speedup, in_bf16),
        )
        for what, key, target, candidates in wanted:
            known = [run for run in candidates if run[key] is not None]
            best = max(known, key=lambda run: run[key], default=None)
            yield {
                "model": name,
                "what": what,
                "target": target,
                "found": None if best is None else best[key],
                "backend": None if best is None else best["backend"],
                "is_met": None if best is None else best[key] >= target,
            }


def _is_whole(config: dict[str, Any], preset: str) -> bool:
    """Whether a run was of the model, not of tiny shapes."""
    keys = ("num_layers", "hidden_size", "vocab_size")
    return all(config[key] == PRESETS[preset][key] for key in keys)


def _output(results: Results, name: str) -> Any:
    """What a part that ended well printed; None: there is nothing."""
    result = results.get(name)
    return result["output"] if result is not None and result["status"] == "ok" else None


def _head(results: Results) -> list[str]:
    machine = _output(results, "machine") or {}
    found = machine.get("capabilities", {})
    lines = [
        "# GPU report",
        "",
        f"{datetime.date.today().isoformat()}, {found.get('device_name') or 'no GPU'}, torch "
        f"{found.get('torch')}, CUDA {found.get('cuda')}, cuDNN {found.get('cudnn')}, megatron-core"
        f" {found.get('megatron_core')}",
        "",
    ]
    libraries = {name: value for name, value in found.items() if isinstance(value, dict)}
    lines += [
        f"- {name}: {value['version'] or ''} {value['problem'] or 'usable'}".replace(":  ", ": ")
        for name, value in libraries.items()
    ]
    if machine.get("nvidia_smi"):
        lines += ["", "```", machine["nvidia_smi"], "```"]
    return lines


def _targets(targets: list[dict[str, Any]]) -> list[str]:
    words = {None: "not measured", True: "yes", False: "**no**"}
    lines = ["## Targets", "", "| model | what | target | found | backend | met |"]
    lines.append("|---|---|---|---|---|---|")
    for row in targets:
        is_share = row["what"].startswith("MFU")
        shown = [_number(row[key], is_share) for key in ("target", "found")]
        lines.append(
            f"| {row['model']} | {row['what']} | {shown[0]} | {shown[1]} | {row['backend'] or '-'} "
            f"| {words[row['is_met']]} |"
        )
    return lines


def _training(runs: list[dict[str, Any]]) -> list[str]:
    if not runs:
        return []
    lines = ["## Training", ""]
    if not all(run["is_whole_model"] for run in runs):
        lines += ["Tiny shapes, to try the report: the figures mean nothing.", ""]
    lines += [
        "| model | backend | micro-batch | ms/step | tokens/s | TFLOP/s | MFU | peak GiB "
        "| over the reference |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        mark = "" if run["is_same_run"] or run["speedup"] is None else " (another process)"
        lines.append(
            f"| {run['model']} | {run['backend']} | {run['micro_batch_size']} "
            f"| {run['ms_per_step']:.1f} | {run['tokens_per_s']:,.0f} | {_number(run['tflops'])} "
            f"| {_number(run['mfu'], True)} | {run['peak_memory_gib']:.2f} "
            f"| {_number(run['speedup'])}{mark} |"
        )
    return lines


def _passes(results: Results, model: str) -> list[str]:
    """Phases and roofline of a model's first run."""
    found = _output(results, f"train-{model}")
    if found is None:
        return []
    lines = [f"## {model}: where the time goes", "", "| ms by phase | ours | reference |"]
    lines.append("|---|---|---|")
    ours, theirs = (found[side]["phases_ms"] for side in ("ours", "reference"))
    lines += [f"| {phase} | {ours[phase]:.1f} | {theirs[phase]:.1f} |" for phase in ours]
    lines += ["", found["mfu_definition"] + ".", "", "```"]
    return [*lines, *roofline_lines(found["roofline"]), "```"]


def _kernels(results: Results, model: str) -> list[str]:
    found = _output(results, f"kernels-{model}")
    if found is None:
        return []
    return [f"## {model}: kernels", "", "```", kernels_as_text(found), "```"]


def _checkpoints(results: Results) -> list[str]:
    rows = []
    for model in MODELS:
        found = _output(results, f"checkpoint-{model}")
        if found is not None:
            rows.append(
                f"| {model} | {found['bytes'] / 1e9:.2f} | {found['stall_s']:.2f} "
                f"| {found['save_mb_per_s']:,.0f} | {found['load_s']:.2f} |"
            )
    header = ["| model | GB | stall s | MB/s | load s |", "|---|---|---|---|---|"]
    return ["## Checkpoints", "", *header, *rows] if rows else []


def _generation(results: Results) -> list[str]:
    found = _output(results, "generate-410m")
    if found is None:
        return []
    return ["## 410m: generation", "", "```", generation_as_text(found), "```"]


def _words(results: Results, name: str, title: str) -> list[str]:
    """The end of what a part printed."""
    result = results.get(name)
    if result is None:
        return []
    shown = result["output"].rstrip().splitlines()
    return [f"## {title}", "", f"{result['status']}:", "", "```", *shown, "```"]


def _problems(results: Results) -> list[str]:
    """Parts that did not end well, with their last words."""
    lines: list[str] = []
    for name, result in results.items():
        if result["status"] != "ok":
            lines += [f"{name}: {result['status']}, exit code {result['exit_code']}", "", "```"]
            lines += [*_tail(result["stderr"]), "```", ""]
    return ["## What failed", "", *lines] if lines else []


def _commands(results: Results) -> list[str]:
    lines = [f"{name}: {shlex.join(result['command'])}" for name, result in results.items()]
    return ["## Commands", "", "```", *lines, "```"]


def _tail(text: str) -> list[str]:
    return text.rstrip().splitlines()[-STDERR_LINES:]


def _number(value: float | None, is_share: bool = False) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" if is_share else f"{value:.3g}"


def _draw(runs: list[dict[str, Any]], results: Results, folder: Path) -> list[str]:
    """Pictures, and their names."""
    names = []
    if runs:
        names.append("training.png")
        _draw_training(runs, folder / names[-1])
    for model in MODELS:
        found = _output(results, f"train-{model}")
        if found is not None and found["roofline"] is not None:
            names.append(f"passes-{model}.png")
            _draw_passes(found["roofline"], model, folder / names[-1])
    return names


def _draw_training(runs: list[dict[str, Any]], path: Path) -> None:
    """MFU where it is known, else tokens per second over the reference's; targets as lines."""
    key = "mfu" if any(run["mfu"] is not None for run in runs) else "speedup"
    models = [name for name in MODELS if any(run["model"] == name for run in runs)]
    figure = Figure(figsize=(9, 3.5), dpi=150, layout="constrained", facecolor="white")
    for axis, name in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        of_model = [run for run in runs if run["model"] == name]
        axis.bar(
            [run["backend"] for run in of_model],
            [run[key] or 0.0 for run in of_model],
            color=OURS,
        )
        axis.axhline(getattr(MODELS[name].target, key), color=TARGET, linestyle="--", linewidth=1)
        label = "MFU" if key == "mfu" else "tokens/s over the reference's"
        axis.set(title=f"{name} (line: target)", ylabel=label)
        axis.tick_params(axis="x", rotation=30)
        axis.spines[["top", "right"]].set_visible(False)
    save_png(figure, path)


def _draw_passes(roofline: dict[str, Any], model: str, path: Path) -> None:
    """Forward time of each pass beside its floor."""
    rows = roofline["passes"]
    figure = Figure(figsize=(6, 3.5), dpi=150, layout="constrained", facecolor="white")
    axis = figure.subplots()
    positions = range(len(rows))
    for shift, key, label, color in (
        (-0.2, "floor_ms", "floor", FLOOR),
        (0.2, "forward_ms", "measured", OURS),
    ):
        axis.bar(
            [p + shift for p in positions],
            [row[key] for row in rows],
            0.4,
            label=label,
            color=color,
        )
    axis.set_xticks(list(positions), [f"pass {p + 1}" for p in positions])
    axis.set(title=f"{model}: forward of each pass", ylabel="ms")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    save_png(figure, path)
