"""The report of `plan_scaling` as a picture: time, communication and memory over devices.

Bars stand in pairs: ours, and paler beside it the compared method in the same layout.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.patches import Patch

from megatron_ponder.figures import new_figure, save_png
from megatron_ponder.planning.run import GIB
from megatron_ponder.planning.scaling import MEMORY_KINDS, SENT_KINDS
from megatron_ponder.planning.scaling_text import fitting_rows, layout_name, run_title

Rows = list[dict[str, Any]]

MIB = 1 << 20
OURS, COMPARED, GREY = "#d97706", "#2563eb", "#9ca3af"
SENT_COLOURS = dict(zip(SENT_KINDS, ("#7c3aed", "#0891b2", "#6b7280", "#dc2626"), strict=True))
TIME_COLOURS = {
    "compute_s": "#059669",
    "recompute_s": "#a3d9b1",
    "tensor_s": SENT_COLOURS["tensor"],
    "context_s": SENT_COLOURS["context"],
    "bubble_s": GREY,
    "data_s": SENT_COLOURS["data"],
}
MEMORY_COLOURS = dict(zip(MEMORY_KINDS, ("#2563eb", "#0891b2", "#7c3aed", "#d97706"), strict=True))
PALE = 0.45


def draw_scaling(result: dict[str, Any], path: Path, name: str = "") -> None:
    """Draw all panels.

    Args:
        result: of `plan_scaling`.
        path: the PNG to write.
        name: of the model, for the title.
    """
    rows, assumed = fitting_rows(result), result["assumed"]
    compared = result["run"]["compared_method"]
    figure = new_figure(14, 8, dpi=110)
    figure.suptitle(
        f"PREDICTED, not run: {name + ', ' if name else ''}{run_title(result)}\n"
        f"{assumed['assumed_tflops']:g} TFLOP/s a device, {assumed['nvlink_gb_per_s']:g} GB/s in a "
        f"node of {assumed['devices_per_node']}, {assumed['network_gb_per_s']:g} GB/s a device to "
        f"others; right bars and dashed lines: {compared} in the same layout",
        fontsize=10,
        x=0.01,
        ha="left",
    )
    panels = list(figure.subplots(2, 3).flat)
    for axes in panels:
        axes.grid(color="#e5e7eb", axis="y")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    if rows:
        per_device, together, time, sent, by_pass, memory = panels
        _per_device(per_device, rows, compared)
        _together(together, rows, compared)
        _time(time, rows)
        _sent(sent, rows)
        _sent_by_pass(by_pass, rows)
        _memory(memory, rows, assumed["device_memory_gib"])
    save_png(figure, path)


def _finish(axes: Axes, rows: Rows, title: str, *, layouts: bool = False, **legend: Any) -> None:
    """Title, legend, and the horizontal axis: numbers of devices, evenly spaced."""
    labels = [f"{row['world_size']:,}" for row in rows]
    if layouts:
        labels = [
            f"{label}\n{layout_name(row['layout'], chr(10))}"
            for label, row in zip(labels, rows, strict=True)
        ]
    axes.set_xticks(range(len(rows)), labels, fontsize=7 if layouts else 9)
    axes.set_xlabel("devices" + (" and layout" if layouts else ""))
    axes.set_title(title, loc="left", fontsize=10)
    if legend:
        axes.legend(frameon=False, fontsize=8, **legend)


def _patches(colours: Mapping[str, str]) -> list[Patch]:
    return [Patch(color=colour, label=kind.removesuffix("_s")) for kind, colour in colours.items()]


def _lines(axes: Axes, rows: Rows, key: str, compared: str) -> None:
    for side, style, colour, label in (
        ("ours", "-", OURS, "ours"),
        ("compared", "--", COMPARED, compared),
    ):
        values = [row[side][key] for row in rows]
        axes.plot(values, marker="o", linestyle=style, color=colour, label=label)
    axes.set_yscale("log")


def _stack(axes: Axes, place: float, width: float, parts: Mapping[str, float], **bar: Any) -> None:
    """One bar of parts, coloured by kind."""
    colours = SENT_COLOURS | TIME_COLOURS | MEMORY_COLOURS
    bottom = 0.0
    for kind, value in parts.items():
        axes.bar(place, value, width=width, bottom=bottom, color=colours[kind], **bar)
        bottom += value


def _pairs(axes: Axes, rows: Rows, key: str, units: Iterable[tuple[float, float]]) -> None:
    """Two stacked bars for each row, each in a unit of its own."""
    for place, (row, pair) in enumerate(zip(rows, units, strict=True)):
        for side, shift, alpha, unit in zip(
            ("ours", "compared"), (-0.2, 0.2), (1.0, PALE), pair, strict=True
        ):
            parts = {kind: value / unit for kind, value in row[side][key].items()}
            _stack(axes, place + shift, 0.38, parts, alpha=alpha)


def _per_device(axes: Axes, rows: Rows, compared: str) -> None:
    """Throughput of a device."""
    key = "tokens_per_s_per_device"
    _lines(axes, rows, key, compared)
    best: dict[str, Any] = {"marker": "_", "markersize": 14, "linestyle": "none", "color": COMPARED}
    values = [row["compared_best"][key] for row in rows]
    axes.plot(values, label=f"{compared}, its best layout", **best)
    for place, row in enumerate(rows):
        for side, offset in (("ours", -13), ("compared", 12)):
            axes.annotate(
                f"{row[side][key]:,.0f}",
                (place, row[side][key]),
                textcoords="offset points",
                xytext=(0, offset),
                ha="center",
                fontsize=8,
            )
    axes.margins(0.12, 0.25)
    _finish(axes, rows, "tokens/s of a device", loc="center left")


def _together(axes: Axes, rows: Rows, compared: str) -> None:
    """Throughput of all devices, and what would be proportional to their number."""
    _lines(axes, rows, "tokens_per_s", compared)
    for side, label in (("ours", "proportional"), ("compared", None)):
        of_one = rows[0][side]["tokens_per_s"] / rows[0]["world_size"]
        ideal = [of_one * row["world_size"] for row in rows]
        axes.plot(ideal, color=GREY, linewidth=0.8, zorder=0, label=label)
    _finish(axes, rows, "tokens/s of all devices", loc="best")


def _time(axes: Axes, rows: Rows) -> None:
    """Where a step's time goes."""
    steps = [(row["ours"]["step_s"], row["compared"]["step_s"]) for row in rows]
    _pairs(axes, rows, "time_s", steps)
    axes.set_ylim(0, 1.25)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    legend: dict[str, Any] = {"handles": _patches(TIME_COLOURS), "loc": "upper left", "ncols": 3}
    _finish(axes, rows, "share of a step's time", layouts=True, **legend)


def _sent(axes: Axes, rows: Rows) -> None:
    """Volume of a step, by kind."""
    for kind, colour in SENT_COLOURS.items():
        for side, style in (("ours", "-"), ("compared", "--")):
            values = [row[side]["sent_bytes_per_step"][kind] / GIB or float("nan") for row in rows]
            axes.plot(values, marker="o", linestyle=style, color=colour)
    axes.set_yscale("log")
    _finish(axes, rows, "GiB sent by a rank in a step", handles=_patches(SENT_COLOURS))


def _sent_by_pass(axes: Axes, rows: Rows) -> None:
    """Volume of one micro-batch in each pass, and in the compared method's only one."""
    highest = 0.0
    for place, row in enumerate(rows):
        whole: Counter[str] = Counter()
        for sent in row["compared"]["sent_bytes_per_pass"]:
            whole.update(sent)
        bars = [*row["ours"]["sent_bytes_per_pass"], whole]
        width = 0.8 / len(bars)
        for index, sent in enumerate(bars):
            parts = {kind: number / MIB for kind, number in sent.items()}
            alpha = PALE if sent is whole else 1.0
            _stack(axes, place - 0.4 + (index + 0.5) * width, 0.9 * width, parts, alpha=alpha)
            highest = max(highest, sum(parts.values()))
    axes.set_ylim(0, 1.05 * highest or 1.0)
    _finish(axes, rows, "MiB sent by a rank in each pass of a micro-batch")


def _memory(axes: Axes, rows: Rows, limit_gib: float) -> None:
    """What the rank that needs most holds."""
    _pairs(axes, rows, "memory_bytes", [(GIB, GIB)] * len(rows))
    axes.axhline(limit_gib, color="#111827", linewidth=0.8)
    axes.set_ylim(0, 1.25 * limit_gib)
    legend: dict[str, Any] = {"handles": _patches(MEMORY_COLOURS), "loc": "upper left", "ncols": 2}
    _finish(axes, rows, "GiB of the rank that needs most (line: the limit)", **legend)
