"""Figures of reports: how they look, and how they are written."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_ponder.files import published


def new_figure(width: float, height: float, dpi: int = 130) -> Figure:
    """An empty white figure.

    Args:
        width: inches.
        height: inches.
        dpi: pixels per inch.
    """
    return Figure(figsize=(width, height), dpi=dpi, layout="constrained", facecolor="white")


def save_png(figure: Figure, path: Path) -> None:
    """Publish a figure as a PNG."""
    with published(path) as unfinished:
        FigureCanvasAgg(figure).print_png(unfinished)
