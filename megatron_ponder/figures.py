"""Figures of reports: how they look, and how they are written."""

import os
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def new_figure(width: float, height: float, dpi: int = 130) -> Figure:
    """An empty white figure.

    Args:
        width: inches.
        height: inches.
        dpi: pixels per inch.
    """
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained", facecolor="white")


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure to a temporary file and rename it; missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    with unfinished.open("wb") as file:
        FigureCanvasAgg(figure).print_png(file)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
