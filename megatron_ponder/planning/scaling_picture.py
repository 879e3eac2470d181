"""The report of `plan_scaling` as a picture: time, communication and memory over devices.

Bars stand in pairs: ours, and paler beside it the compared method in the same layout.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_ponder.planning.scaling import MEMORY_KINDS, SENT_KINDS
from megatron_ponder.planning.scaling_text import layout_name, run_title

GIB, MIB = 1 << 30, 1 << 20
OURS, COMPARED = "#d97706", "#2563eb"
SENT_COLOURS = {
    "tensor": "#7c3aed",
    "context": "#0891b2",
    "pipeline": "#6b7280",
    "data": "#dc2626",
}
TIME_COLOURS = {
    "compute_s": "#059669",
    "recompute_s": "#a3d9b1",
    "tensor_s": SENT_COLOURS["tensor"],
    "context_s": SENT_COLOURS["context"],
    "bubble_s": "#9ca3af",
    "data_s": SENT_COLOURS["data"],
}
MEMORY_COLOURS = dict(zip(MEMORY_KINDS, ("#2563eb", "#0891b2", "#7c3aed", "#d97706"), strict=True))
BAR_WIDTH, PALE = 0.38, 0.45


def draw_scaling(result: dict[str, Any], path: Path, name: str = "") -> None:
    """Draw all panels.

    Args:
        result: of `plan_scaling`.
        path: the PNG to write.
        name: of the model, for the title.
    """
    rows = [row for row in result["rows"] if row["layout"] is not None]
    figure = Figure(figsize=(14, 8), dpi=110, layout="constrained", facecolor="white")
    run, assumed = result["run"], result["assumed"]
    figure.suptitle(
        f"PREDICTED, not run: {name + ', ' if name else ''}{run_title(result)}\n"
        f"{assumed['assumed_tflops']:g} TFLOP/s a device, {assumed['nvlink_gb_per_s']:g} GB/s in a "
        f"node of {assumed['devices_per_node']}, {assumed['network_gb_per_s']:g} GB/s a device to "
        f"others; right bars and dashed lines: {run['compared_method']} in the same layout",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    panels = figure.subplots(2, 3).flat
    for axes, draw in zip(
        panels, (_per_device, _together, _time, _sent, _sent_by_pass, _memory), strict=True
    ):
        if rows:
            draw(axes, rows, result)
        axes.grid(color="#e5e7eb", axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    FigureCanvasAgg(figure).print_png(unfinished)
    unfinished.replace(path)


def _devices(axes: Axes, rows: Sequence[dict[str, Any]], *, layouts: bool = False) -> None:
    """The horizontal axis: numbers of devices, evenly spaced."""
    labels = [f"{row['world_size']:,}" for row in rows]
    if layouts:
        labels = [
            f"{label}\n{layout_name(row['layout'], chr(10))}"
            for label, row in zip(labels, rows, strict=True)
        ]
    axes.set_xticks(range(len(rows)), labels, fontsize=7 if layouts else 9)
    axes.set_xlabel("devices" + (" and layout" if layouts else ""))


def _lines(axes: Axes, rows: Sequence[dict[str, Any]], key: str, compared: str) -> None:
    places = range(len(rows))
    axes.plot(places, [row["ours"][key] for row in rows], marker="o", color=OURS, label="ours")
    axes.plot(
        places,
        [row["compared"][key] for row in rows],
        marker="o",
        linestyle="--",
        color=COMPARED,
        label=compared,
    )
    axes.set_yscale("log")
    _devices(axes, rows)


def _per_device(axes: Axes, rows: Sequence[dict[str, Any]], result: dict[str, Any]) -> None:
    """Throughput of a device."""
    _lines(axes, rows, "tokens_per_s_per_device", result["run"]["compared_method"])
    axes.plot(
        range(len(rows)),
        [row["compared_best"]["tokens_per_s_per_device"] for row in rows],
        marker="_",
        markersize=14,
        linestyle="none",
        color=COMPARED,
        label=f"{result['run']['compared_method']}, its best layout",
    )
    for place, row in enumerate(rows):
        for side, offset in (("ours", -13), ("compared", 12)):
            value = row[side]["tokens_per_s_per_device"]
            axes.annotate(
                f"{value:,.0f}",
                (place, value),
                textcoords="offset points",
                xytext=(0, offset),
                ha="center",
                fontsize=8,
            )
    axes.margins(0.12, 0.25)
    axes.set_title("tokens/s of a device", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="center left")


def _together(axes: Axes, rows: Sequence[dict[str, Any]], result: dict[str, Any]) -> None:
    """Throughput of all, with what would be proportional."""
    _lines(axes, rows, "tokens_per_s", result["run"]["compared_method"])
    first = rows[0]
    for side in ("ours", "compared"):
        ideal = [
            first[side]["tokens_per_s"] * row["world_size"] / first["world_size"] for row in rows
        ]
        label = "proportional" if side == "ours" else None
        axes.plot(range(len(rows)), ideal, color="#9ca3af", linewidth=0.8, zorder=0, label=label)
    axes.set_title("tokens/s of all devices", loc="left", fontsize=10)
    axes.legend(frameon=False, fontsize=8)


def _stack(
    axes: Axes, place: float, parts: dict[str, float], colours: dict[str, str], pale: bool
) -> None:
    bottom = 0.0
    for kind, value in parts.items():
        axes.bar(
            place,
            value,
            width=BAR_WIDTH,
            bottom=bottom,
            color=colours[kind],
            alpha=PALE if pale else 1.0,
        )
        bottom += value


def _legend(axes: Axes, colours: dict[str, str], **where: Any) -> None:
    handles = [
        Patch(color=colour, label=kind.removesuffix("_s")) for kind, colour in colours.items()
    ]
    axes.legend(handles=handles, frameon=False, fontsize=8, **where)


def _time(axes: Axes, rows: Sequence[dict[str, Any]], result: dict[str, Any]) -> None:
    """Where a step's time goes."""
    for place, row in enumerate(rows):
        for side, shift in (("ours", -0.2), ("compared", 0.2)):
            parts = {k: v / row[side]["step_s"] for k, v in row[side]["time_s"].items()}
            _stack(axes, place + shift, parts, TIME_COLOURS, side == "compared")
    _devices(axes, rows, layouts=True)
    axes.set_ylim(0, 1.25)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_title("share of a step's time", loc="left", fontsize=10)
    _legend(axes, TIME_COLOURS, loc="upper left", ncols=3)


def _sent(axes: Axes, rows: Sequence[dict[str, Any]], result: dict[str, Any]) -> None:
    """Volume of a step, by kind."""
    for kind in SENT_KINDS:
        for side, style in (("ours", "-"), ("compared", "--")):
            values = [row[side]["sent_bytes_per_step"][kind] / GIB for row in rows]
            axes.plot(
                range(len(rows)),
                [value or float("nan") for value in values],
                marker="o",
                linestyle=style,
                color=SENT_COLOURS[kind],
            )
    axes.set_yscale("log")
    _devices(axes, rows)
    axes.set_title("GiB sent by a rank in a step", loc="left", fontsize=10)
    _legend(axes, SENT_COLOURS)


def _sent_by_pass(axes: Axes, rows: Sequence[dict[str, Any]], result: dict[str, Any]) -> None:
    """Volume of one micro-batch in each pass, and in the compared method's only one."""
    num_passes = len(rows[0]["ours"]["sent_bytes_per_pass"])
    highest = 0.0
    width = 0.8 / (num_passes + 1)
    for place, row in enumerate(rows):
        passes = row["ours"]["sent_bytes_per_pass"]
        whole = _added(row["compared"]["sent_bytes_per_pass"])
        for index, sent in enumerate([*passes, whole]):
            bottom = 0.0
            for kind, number in sent.items():
                axes.bar(
                    place - 0.4 + (index + 0.5) * width,
                    number / MIB,
                    width=0.9 * width,
                    bottom=bottom,
                    color=SENT_COLOURS[kind],
                    alpha=PALE if index == num_passes else 1.0,
                )
                bottom += number / MIB
            highest = max(highest, bottom)
    axes.set_ylim(0, 1.05 * highest or 1.0)
    _devices(axes, rows)
    axes.set_title("MiB sent by a rank in each pass of a micro-batch", loc="left", fontsize=10)


def _added(passes: Sequence[dict[str, int]]) -> dict[str, int]:
    return {kind: sum(one[kind] for one in passes) for kind in passes[0]}


def _memory(axes: Axes, rows: Sequence[dict[str, Any]], result: dict[str, Any]) -> None:
    """What the fullest rank holds."""
    for place, row in enumerate(rows):
        for side, shift in (("ours", -0.2), ("compared", 0.2)):
            parts = {k: v / GIB for k, v in row[side]["memory_bytes"].items()}
            _stack(axes, place + shift, parts, MEMORY_COLOURS, side == "compared")
    axes.axhline(result["assumed"]["device_memory_gib"], color="#111827", linewidth=0.8)
    axes.set_ylim(0, 1.25 * result["assumed"]["device_memory_gib"])
    _devices(axes, rows)
    axes.set_title("GiB of the fullest rank (line: what it may fill)", loc="left", fontsize=10)
    _legend(axes, MEMORY_COLOURS, loc="upper left", ncols=2)
