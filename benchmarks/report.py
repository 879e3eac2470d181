"""What every benchmark shares: the machine, tables, figures, and files that appear complete.

A result is a dictionary that JSON can hold. Its text is a heading, then tables.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.runtime.device import device


def environment(config: ResolvedConfig) -> dict[str, Any]:
    """Date, device, versions and settings that a result holds for."""
    is_cuda = device().type == "cuda"
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if is_cuda else f"CPU ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "megatron_core": importlib.metadata.version("megatron-core"),
            "transformers": importlib.metadata.version("transformers"),
        },
        "config": config.to_flat_dict(),
    }


def heading(result: dict[str, Any]) -> str:
    """One line that says where a result was measured."""
    versions = result["versions"]
    return (
        f"{result['device']}, {result['threads']} threads, torch {versions['torch']}, "
        f"megatron-core {versions['megatron_core']}, {result['date']}"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Columns aligned on the right.

    Args:
        header: names of the columns.
        rows: cells; a float is written with four digits, None as a dash.
    """
    lines = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    )


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "-" if value is None else str(value)


def percent(value: float | None) -> str:
    """A share as a cell."""
    return "-" if value is None else f"{value:.1%}"


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median of the rounds, with the least and the largest."""
    return {"median": statistics.median(values), "least": min(values), "largest": max(values)}


def spread_text(ratio: dict[str, float]) -> str:
    """A `spread` in words."""
    return (
        f"{ratio['median']:.3f} (median of rounds, from {ratio['least']:.3f} to "
        f"{ratio['largest']:.3f})"
    )


@contextlib.contextmanager
def published(path: Path) -> Iterator[Path]:
    """A path to write to; when the block ends, the file is flushed to disk and gets its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")  # keeps the suffix, which may decide the format
    yield unfinished
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def write_json(value: Any, path: Path) -> None:
    """Write a result."""
    with published(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def new_figure(num_panels: int, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, row by row."""
    columns = min(columns, num_panels)
    rows = -(-num_panels // columns)
    size = (4.4 * columns, 0.8 + 3.1 * rows)
    figure = Figure(figsize=size, dpi=110, layout="constrained", facecolor="white")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.grid(color="#e5e7eb")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[num_panels:]:
        axes.set_visible(False)
    return figure, panels[:num_panels]


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure."""
    with published(path) as unfinished:
        FigureCanvasAgg(figure).print_png(unfinished)
