"""Fills the parity tables of docs/parallelism.md: python -m tests.parity.table (half an hour).

Runs the whole matrix. Finished runs are kept in runs/parity.jsonl, so that it can be interrupted,
and models that are added later are measured alone; delete the file to measure all anew.
"""

import importlib.metadata
import json
import tempfile
import time
from pathlib import Path

import torch

from tests.parity.layouts import (
    LAYOUTS,
    MODELS,
    RECOMPUTE,
    Layout,
    measure_layout,
    prepare_checkpoints,
)
from tests.parity.measure import Measured
from tests.parity.tolerances import (
    GRAD_NORM_RELATIVE,
    GRADIENT_RELATIVE,
    LOGITS_ABSOLUTE,
    LOSS_ABSOLUTE,
    WEIGHTS_ABSOLUTE,
    largest_difference,
)

DOCUMENT = Path("docs/parallelism.md")
KEPT = Path("runs/parity.jsonl")
BEGIN, END = "<!-- parity tables: begin -->\n", "<!-- parity tables: end -->"
TOLERANCES = (
    LOGITS_ABSOLUTE,
    LOSS_ABSOLUTE,
    GRAD_NORM_RELATIVE,
    GRADIENT_RELATIVE,
    WEIGHTS_ABSOLUTE,
)


def differences(actual: Measured, expected: Measured) -> list[float]:
    """Logits, loss, gradient norm (relative), gradients (to their largest entry), weights."""
    gradients = [
        largest_difference(actual.gradients[name], gradient)
        / max(float(gradient.abs().max()), 1e-6)
        for name, gradient in expected.gradients.items()
    ]
    weights = [largest_difference(actual.weights[name], w) for name, w in expected.weights.items()]
    losses = zip(actual.losses, expected.losses, strict=True)
    norms = zip(actual.grad_norms, expected.grad_norms, strict=True)
    return [
        largest_difference(actual.logits, expected.logits),
        max(abs(a - e) for a, e in losses),
        max(abs(a - e) / e for a, e in norms),
        max(gradients),
        max(weights),
    ]


def run_matrix() -> dict[str, dict[str, dict[str, list[float]]]]:
    """Differences by layout, recomputation and model; each the largest over ranks."""
    found: dict = {name: {} for name in LAYOUTS}
    KEPT.parent.mkdir(exist_ok=True)
    for line in KEPT.read_text().splitlines() if KEPT.exists() else []:
        run = json.loads(line)
        found[run["layout"]].setdefault(run["recompute"], {}).update(run["differences"])
    todo = [
        (name, recompute, missing)
        for name in LAYOUTS
        for recompute in RECOMPUTE
        if (missing := [m for m in MODELS if m not in found[name].get(recompute, {})])
    ]
    with tempfile.TemporaryDirectory() as folder:
        prepare_checkpoints(Path(folder))
        truth = measure_layout(Layout(1, {}), list(MODELS), folder)[0]
        start_s = time.monotonic()
        for position, (name, recompute, models) in enumerate(todo):
            layout = LAYOUTS[name]
            settings = layout.settings | RECOMPUTE[recompute]
            wider = Layout(layout.world_size, settings)
            by_rank = measure_layout(wider, models, folder)
            cell = {
                model: [
                    max(column)
                    for column in zip(
                        *(differences(m[model], truth[model]) for m in by_rank), strict=True
                    )
                ]
                for model in models
            }
            found[name].setdefault(recompute, {}).update(cell)
            with KEPT.open("a") as kept:
                record = {"layout": name, "recompute": recompute, "differences": cell}
                kept.write(json.dumps(record) + "\n")
            each_s = (time.monotonic() - start_s) / (position + 1)
            left_s = each_s * (len(todo) - position - 1)
            print(f"{name}, recompute {recompute} ({left_s / 60:.0f} min left)", flush=True)
    return found


def worst_table(found: dict) -> list[str]:
    """Per layout the largest differences over all models and recomputations."""
    lines = [
        "| layout | ranks | logits | loss (3 steps) | gradient norm, relative "
        "| gradients, relative to the largest entry | weights after 3 steps |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, by_recompute in found.items():
        runs = [cell for by_model in by_recompute.values() for cell in by_model.values()]
        worst = [max(column) for column in zip(*runs, strict=True)]
        figures = " | ".join(f"{v:.1e}" if v else "0" for v in worst)
        lines.append(f"| {name} | {LAYOUTS[name].world_size} | {figures} |")
    return lines


def cell_table(found: dict) -> list[str]:
    """Per layout and model three cells: nothing, layers, passes recomputed."""
    lines = [
        "| layout | " + " | ".join(MODELS) + " |",
        "|---" * (1 + len(MODELS)) + "|",
    ]
    for name, by_recompute in found.items():
        cells = [
            " ".join(_share_of_tolerance(by_recompute[r][model]) for r in RECOMPUTE)
            for model in MODELS
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _share_of_tolerance(values: list[float]) -> str:
    """The largest of the five differences, each in percent of what is allowed."""
    return f"{100 * max(v / t for v, t in zip(values, TOLERANCES, strict=True)):.0f}"


def main() -> None:
    """Measure, and rewrite the part of the document between the marks."""
    found = run_matrix()
    versions = (
        f"megatron-core {importlib.metadata.version('megatron-core')}, torch {torch.__version__}, "
        f"CPU, fp32, {time.strftime('%Y-%m-%d')}"
    )
    lines = [
        f"Largest differences over all models, recomputations and ranks ({versions}):",
        "",
        *worst_table(found),
        "",
        "Every cell of the matrix: the largest of the five differences in percent of what is "
        "allowed, with nothing, layers (`full`) and passes (`pass`) recomputed:",
        "",
        *cell_table(found),
        "",
    ]
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    DOCUMENT.write_text(before + BEGIN + "\n".join(lines) + END + after)


if __name__ == "__main__":
    main()
