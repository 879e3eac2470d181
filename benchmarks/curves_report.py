"""Cost curves as text and as a picture."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

TITLES = {
    "thoughts": "latent thoughts K",
    "jacobi-iterations": "Jacobi iterations R",
    "seq-length": "tokens in a sequence",
    "width": "hidden size (heads and MLP with it)",
    "depth": "layers",
    "micro-batch": "sequences in a micro-batch (batch with it)",
    "method": "method",
    "recomputation": "recomputation",
    "data-parallel": "data-parallel ranks, same batch",
    "pipeline": "pipeline ranks, same batch",
}
GROWING = ("seq-length", "width", "depth", "micro-batch")
"""Multiples: drawn on logarithmic axes."""
TIME, MEMORY = "#d97706", "#2563eb"
NUM_COLUMNS = 3
MIB = 1 << 20


def as_text(result: dict[str, Any]) -> str:
    """The figures of `benchmark_curves` for people."""
    base, load = result["base"], result["load_average"]
    lines = [
        f"{result['device']}, {result['threads']} threads per rank, torch "
        f"{result['versions']['torch']}, megatron-core {result['versions']['megatron_core']}, "
        f"{result['date']}; load {load['at_start'][0]:.1f} at the start, {load['at_end'][0]:.1f} "
        "at the end",
        f"base: {base['ms_per_step']:.1f} ms/step, {base['memory_bytes'] / MIB:.1f} MiB "
        f"({base['predicted_memory_bytes'] / MIB:.1f} predicted), {base['flops'] / 1e9:.4g} GFLOP",
        f"ratios to it, time as the median of {result['rounds']} rounds (least to largest), and of "
        "both sides' fastest",
    ]
    for variable, points in result["curves"].items():
        lines += [
            "",
            f"{TITLES[variable]:>44} {'time':>6} {'':>16} {'fastest':>8} {'by FLOPs':>9} "
            f"{'memory':>7} {'planned':>8}",
        ]
        for point in points:
            time, memory = point["time"], point["memory"]
            spread = f"({time['least']:.2f} to {time['largest']:.2f})"
            lines.append(
                f"{point['value']:>44} {time['median']:>6.2f} {spread:>16} "
                f"{time['of_fastest']:>8.2f} {time['predicted']:>9.2f} "
                f"{memory['measured']:>7.2f} {memory['predicted']:>8.2f}"
            )
    lines += [f"\nleft out: {what}: {why}" for what, why in result["skipped"].items()]
    return "\n".join(lines)


def write_record(result: dict[str, Any], path: Path) -> None:
    """Keep everything as JSON.

    Args:
        result: of `benchmark_curves`.
        path: the file to write.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    unfinished.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    unfinished.replace(path)


def draw_curves(result: dict[str, Any], path: Path) -> None:
    """Draw a panel for each variable.

    Args:
        result: of `benchmark_curves`.
        path: the PNG to write.
    """
    curves = result["curves"]
    num_rows = -(-len(curves) // NUM_COLUMNS)
    figure = Figure(
        figsize=(4.4 * min(NUM_COLUMNS, len(curves)), 0.8 + 3.1 * num_rows),
        dpi=110,
        layout="constrained",
        facecolor="white",
    )
    panels = figure.subplots(num_rows, min(NUM_COLUMNS, len(curves)), squeeze=False).flat
    for axes in list(panels)[len(curves) :]:
        axes.set_visible(False)
    for axes, (variable, points) in zip(figure.axes, curves.items(), strict=False):
        if points:
            _draw_curve(axes, variable, points)
        axes.set_title(TITLES[variable], loc="left", fontsize=10)
        axes.grid(color="#e5e7eb")
        axes.spines[["top", "right"]].set_visible(False)
    config = result["config"]
    figure.suptitle(
        f"time and memory of a training step, as ratios to the base: {config['num_layers']} layers "
        f"of width {config['hidden_size']}, {config['seq_length']} tokens,\n{config['method']} "
        f"K={config['num_latent_thoughts']} R={config['num_jacobi_iterations']}, "
        f"{'bf16' if config['bf16'] else 'fp32'}, {result['device']}, {result['date']}",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    FigureCanvasAgg(figure).print_png(unfinished)
    unfinished.replace(path)


def _draw_curve(axes: Axes, variable: str, points: Sequence[dict[str, Any]]) -> None:
    """Measured ratios as points, with the middle half of the rounds; predicted ones as lines."""
    values = [point["value"] for point in points]
    is_named = isinstance(values[0], str)
    places = range(len(values)) if is_named else values
    time = [point["time"]["median"] for point in points]
    spread = [
        [point["time"]["median"] - point["time"]["quartiles"][0] for point in points],
        [point["time"]["quartiles"][1] - point["time"]["median"] for point in points],
    ]
    style: dict[str, Any] = {"linestyle": "none", "capsize": 3, "markersize": 5}
    axes.errorbar(
        places,
        time,
        spread,
        marker="o",
        color=TIME,
        label="time, measured (bar: middle half of rounds)",
        **style,
    )
    line: dict[str, Any] = {"linestyle": "none", "marker": "_", "markersize": 16}
    if not is_named:
        line = {"linestyle": "--", "linewidth": 1.2}
    predicted = [point["time"]["predicted"] for point in points]
    axes.plot(places, predicted, color=TIME, label="time, by FLOPs", **line)
    memory = [point["memory"]["measured"] for point in points]
    axes.plot(
        places,
        memory,
        marker="s",
        markersize=5,
        linestyle="none",
        color=MEMORY,
        label="memory, measured",
    )
    planned = [point["memory"]["predicted"] for point in points]
    axes.plot(places, planned, color=MEMORY, label="memory, planned", **line)
    if variable in GROWING:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    labels = [str(value).replace(" ", "\n") for value in values]
    axes.set_xticks(list(places), labels, fontsize=8)
    axes.margins(x=0.1)
