"""A timeline as a picture: a row for each stage, a colour for each pass."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.planning.options import PlanOptions
from megatron_ponder.planning.report import largest_plan, microbatches_per_step, simulate_step
from megatron_ponder.planning.timeline import Event, Timeline

Colour = tuple[float, float, float]

COLOURS = (
    "#2563eb",
    "#d97706",
    "#059669",
    "#db2777",
    "#7c3aed",
    "#0891b2",
    "#ca8a04",
    "#dc2626",
    "#4b5563",
    "#65a30d",
)
BACKWARD_SHADE, FORWARD_TINT = 0.72, 0.62
NARROWEST_NUMBERED_INCHES = 0.11
"""Narrower boxes hold no micro-batch number."""
ROW_HEIGHT = 0.86
MOST_COLUMNS = 96
"""Boxes in a row that can still be told apart."""


def draw_step(options: PlanOptions, config: ResolvedConfig, path: Path) -> None:
    """Draw a run's step as far as it can be read: of many micro-batches only the first.

    Args:
        options: ranks and rate.
        config: resolved.
        path: the PNG to write.
    """
    plan = largest_plan(config)
    num_layer_chunks = config.parallel.num_virtual_stages_per_pipeline_rank
    num_pipeline_stages = config.parallel.pipeline_model_parallel_size
    num_chunks = len(plan.passes) * num_layer_chunks
    whole = microbatches_per_step(config, options.world_size)
    room = MOST_COLUMNS // (2 * num_chunks) // num_pipeline_stages * num_pipeline_stages
    num_drawn = min(whole, max(room, num_pipeline_stages))
    timeline = simulate_step(options, config, plan, num_drawn)
    drawn = f"{num_drawn} micro-batches"
    if num_drawn < whole:
        drawn += f" (the run has {whole})"
    title = f"{num_pipeline_stages} stages, {drawn}, {len(plan.passes)} passes"
    if num_layer_chunks > 1:
        title += f" through {num_layer_chunks} layer chunks"
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
    num_columns = (
        2 * pipeline.num_chunks * pipeline.num_microbatches + 2 * pipeline.num_pipeline_stages
    )
    width = min(max(9.0, 0.19 * num_columns), 40.0)
    height = 1.9 + 0.42 * pipeline.num_pipeline_stages
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained", facecolor="white")
    axes = figure.subplots()
    inches_per_s = 0.92 * width / timeline.makespan_s
    for event in timeline.events:
        if event.end_s > event.start_s:
            _draw_event(axes, event, num_layer_chunks, inches_per_s)
    axes.set_xlim(0, timeline.makespan_s)
    axes.set_ylim(pipeline.num_pipeline_stages - 0.5, -0.5)
    axes.set_yticks(
        range(pipeline.num_pipeline_stages),
        [f"stage {s}" for s in range(pipeline.num_pipeline_stages)],
    )
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(_time_label(timeline))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.set_facecolor("#f3f4f6")
    axes.set_title(f"{title}: bubble {timeline.bubble:.1%}", loc="left", fontsize=11)
    num_passes = pipeline.num_chunks // num_layer_chunks
    handles = [Patch(color=_colour(i, False), label=f"pass {i + 1}") for i in range(num_passes)]
    handles += [
        Patch(color=_shade("#6b7280", False), label="forward"),
        Patch(color=_shade("#6b7280", True), label="backward"),
        Patch(facecolor="#f3f4f6", edgecolor="#d1d5db", label="waiting"),
    ]
    figure.legend(
        handles=handles, loc="outside lower left", ncols=min(len(handles), 9), frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    FigureCanvasAgg(figure).print_png(unfinished)
    unfinished.replace(path)


def _draw_event(axes: Axes, event: Event, num_layer_chunks: int, inches_per_s: float) -> None:
    """One box, numbered where there is room."""
    work, width_s = event.work, event.end_s - event.start_s
    pass_, layer_chunk = divmod(work.chunk, num_layer_chunks)
    axes.barh(
        event.stage,
        width_s,
        left=event.start_s,
        height=ROW_HEIGHT,
        color=_colour(pass_, work.is_backward),
        edgecolor="white",
        linewidth=0.6,
    )
    text = str(work.microbatch + 1)
    if num_layer_chunks > 1:
        text += f"\nc{layer_chunk}"
    if width_s * inches_per_s >= NARROWEST_NUMBERED_INCHES * max(map(len, text.split("\n"))) * 0.75:
        axes.text(
            event.start_s + width_s / 2,
            event.stage,
            text,
            ha="center",
            va="center",
            fontsize=7,
            color="white" if work.is_backward else "black",
        )


def _colour(pass_: int, is_backward: bool) -> Colour:
    """The pass's colour."""
    return _shade(COLOURS[pass_ % len(COLOURS)], is_backward)


def _shade(colour: str, is_backward: bool) -> Colour:
    """Dark for a backward, light for a forward."""
    red, green, blue = to_rgb(colour)
    if is_backward:
        return BACKWARD_SHADE * red, BACKWARD_SHADE * green, BACKWARD_SHADE * blue
    tint, rest = FORWARD_TINT, 1 - FORWARD_TINT
    return tint + rest * red, tint + rest * green, tint + rest * blue


def _time_label(timeline: Timeline) -> str:
    """What the axis counts."""
    return f"time; one step is {timeline.makespan_s:.4g} s"
