"""What every benchmark shares: the machine, tables and panels of figures.

A result is a dictionary that JSON can hold. Its text is a heading, then tables.
"""

import datetime
import importlib.metadata
import platform
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.figures import new_figure
from megatron_ponder.runtime.device import device
from megatron_ponder.tables import text_table


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
    return "\n".join(text_table(header, [[_cell(value) for value in row] for row in rows]))


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


def new_panels(num_panels: int, columns: int = 3) -> tuple[Figure, list[Axes]]:
    """A figure of equal panels, row by row."""
    columns = min(columns, num_panels)
    rows = -(-num_panels // columns)
    figure = new_figure(4.4 * columns, 0.8 + 3.1 * rows, dpi=110)
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels:
        axes.grid(color="#e5e7eb")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[num_panels:]:
        axes.set_visible(False)
    return figure, panels[:num_panels]
