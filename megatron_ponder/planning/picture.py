"""A timeline as a picture: a row for each stage, a colour for each pass."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from megatron_ponder.figures import new_figure, save_png
from megatron_ponder.planning.flops import simulate_step
from megatron_ponder.planning.run import PlannedRun
from megatron_ponder.planning.timeline import Event, Timeline

Colour = tuple[float, float, float]

PASS_COLOURS = (
    *("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed"),
    *("#0891b2", "#ca8a04", "#dc2626", "#4b5563", "#65a30d"),
)
GREY, BACKGROUND = "#6b7280", "#f3f4f6"
BACKWARD_SHADE, FORWARD_TINT = 0.72, 0.62
NARROWEST_NUMBERED_INCHES = 0.11
"""Narrower boxes hold no micro-batch number."""
MOST_COLUMNS = 96
"""Boxes in a row that can still be told apart."""


def draw_step(run: PlannedRun, path: Path, tflops: float) -> None:
    """Draw a step of a run; of many micro-batches only as many as can be told apart.

    Args:
        run: the run.
        path: the PNG to write.
        tflops: rate of a device in TFLOP/s.
    """
    num_layer_chunks = run.config.parallel.num_virtual_stages_per_pipeline_rank
    num_passes, num_stages, whole = len(run.plan.passes), run.num_stages, run.num_microbatches
    room = MOST_COLUMNS // (2 * len(run.chunks)) // num_stages * num_stages
    num_drawn = min(whole, max(room, num_stages))
    timeline = simulate_step(run, tflops, num_drawn)
    title = f"{num_stages} stages, {num_drawn} micro-batches"
    title += f" (the run has {whole})" if num_drawn < whole else ""
    title += f", {num_passes} passes"
    title += f" through {num_layer_chunks} layer chunks" if num_layer_chunks > 1 else ""
    draw_timeline(timeline, path, title=title, num_layer_chunks=num_layer_chunks)


def draw_timeline(timeline: Timeline, path: Path, *, title: str, num_layer_chunks: int = 1) -> None:
    """Draw one step.

    Forwards are light, backwards dark; the number in a box is the micro-batch.

    Args:
        timeline: what to draw.
        path: the PNG to write.
        title: above the picture; the bubble is added to it.
        num_layer_chunks: v, chunks of layers of a stage; `c1` is the second.
    """
    pipeline = timeline.pipeline
    num_stages, num_passes = pipeline.num_pipeline_stages, pipeline.num_chunks // num_layer_chunks
    num_columns = 2 * pipeline.num_chunks * pipeline.num_microbatches + 2 * num_stages
    width = min(max(9.0, 0.19 * num_columns), 40.0)
    figure = new_figure(width, 1.9 + 0.42 * num_stages)
    axes = figure.subplots()
    inches_per_s = 0.92 * width / timeline.makespan_s
    for event in timeline.events:
        if event.end_s > event.start_s:
            _draw_event(axes, event, num_layer_chunks, inches_per_s)
    axes.set_xlim(0, timeline.makespan_s)
    axes.set_ylim(num_stages - 0.5, -0.5)
    axes.set_yticks(range(num_stages), [f"stage {stage}" for stage in range(num_stages)])
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"time; one step is {timeline.makespan_s:.4g} s")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_facecolor(BACKGROUND)
    axes.set_title(f"{title}: bubble {timeline.bubble:.1%}", loc="left", fontsize=11)
    handles = [
        *(Patch(color=_colour(i, False), label=f"pass {i + 1}") for i in range(num_passes)),
        Patch(color=_shade(GREY, False), label="forward"),
        Patch(color=_shade(GREY, True), label="backward"),
        Patch(facecolor=BACKGROUND, edgecolor="#d1d5db", label="waiting"),
    ]
    num_columns = min(len(handles), 9)
    figure.legend(handles=handles, loc="outside lower left", ncols=num_columns, frameon=False)
    save_png(figure, path)


def _draw_event(axes: Axes, event: Event, num_layer_chunks: int, inches_per_s: float) -> None:
    """One box, numbered where there is room."""
    work, width_s = event.work, event.end_s - event.start_s
    pass_, layer_chunk = divmod(work.chunk, num_layer_chunks)
    text = str(work.microbatch + 1) + (f"\nc{layer_chunk}" if num_layer_chunks > 1 else "")
    num_characters = max(map(len, text.split("\n")))
    is_numbered = width_s * inches_per_s >= NARROWEST_NUMBERED_INCHES * num_characters * 0.75
    bars = axes.barh(
        event.stage,
        width_s,
        left=event.start_s,
        height=0.86,
        color=_colour(pass_, work.is_backward),
        edgecolor="white",
        linewidth=0.6,
    )
    if is_numbered:
        colour = "white" if work.is_backward else "black"
        axes.bar_label(bars, [text], label_type="center", fontsize=7, color=colour)


def _colour(pass_: int, is_backward: bool) -> Colour:
    """The pass's colour."""
    return _shade(PASS_COLOURS[pass_ % len(PASS_COLOURS)], is_backward)


def _shade(colour: str, is_backward: bool) -> Colour:
    """Dark for a backward, light for a forward."""
    factor, offset = (BACKWARD_SHADE, 0.0) if is_backward else (1 - FORWARD_TINT, FORWARD_TINT)
    red, green, blue = (offset + factor * part for part in to_rgb(colour))
    return red, green, blue
