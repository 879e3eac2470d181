"""Pictures hold what they are drawn from: every box and bar, on axes from zero."""

from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_ponder.planning import picture, scaling, scaling_picture
from tests.unit.planning.runs import small_run
from tests.unit.planning.test_scaling import OPTIONS, laid_out, run_of


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that would have been written."""
    figures: list[Figure] = []
    for module in (picture, scaling_picture):
        monkeypatch.setattr(module, "save_png", lambda figure, path: figures.append(figure))
    return figures


def panels(figure: Figure) -> dict[str, Axes]:
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


@pytest.mark.parametrize("chunks", [1, 2])
def test_a_step(chunks: int, drawn: list[Figure]) -> None:
    """2 stages, 4 passes, 2 micro-batches: a forward and a backward of each in every row."""
    run = small_run(
        *("llama", "K1", 2),
        pipeline_model_parallel_size=2,
        num_virtual_stages_per_pipeline_rank=chunks,
        global_batch_size=4,
    )
    picture.draw_step(run, Path("unused"), tflops=1.0)
    (axes,) = drawn[0].axes
    boxes = [box for box in axes.patches if box.get_width() > 0]
    assert len(boxes) == 2 * 2 * 4 * chunks * 2
    for stage in (0, 1):
        row = sorted(
            (box.get_x(), box.get_x() + box.get_width())
            for box in boxes
            if box.get_y() < stage < box.get_y() + box.get_height()
        )
        assert len(row) == len(boxes) / 2
        assert all(end <= begin + 1e-12 for (_, end), (begin, _) in zip(row, row[1:], strict=False))
        assert axes.get_xlim()[0] == 0 <= row[0][0] and row[-1][1] <= axes.get_xlim()[1] + 1e-12
    labels = {text.get_text() for text in axes.texts}
    assert labels <= {f"{m}\nc{c}" if chunks > 1 else m for m in "12" for c in range(chunks)}
    assert labels and len(axes.texts) <= len(boxes)


def test_narrow_boxes_hold_no_number(drawn: list[Figure]) -> None:
    """The longest boxes hold one, and the shortest do not."""
    run = small_run("llama", "K2", 2, pipeline_model_parallel_size=2, global_batch_size=16)
    picture.draw_step(run, Path("unused"), tflops=1.0)
    (axes,) = drawn[0].axes
    inches_per_s = 0.92 * drawn[0].get_size_inches()[0] / axes.get_xlim()[1]
    widths = [box.get_width() * inches_per_s for box in axes.patches if box.get_width() > 0]
    wide = [width for width in widths if width >= picture.NARROWEST_NUMBERED_INCHES * 2 * 0.75]
    least = picture.NARROWEST_NUMBERED_INCHES * 0.75
    assert len(wide) <= len(axes.texts) <= sum(width >= least for width in widths)


def test_scaling(drawn: list[Figure], monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    best = laid_out(**sizes, sequence_parallel=True)
    monkeypatch.setattr(scaling, "find_layout", lambda *arguments: (best, 1))
    result = scaling.plan_scaling(OPTIONS, run_of())
    scaling_picture.draw_scaling(result, Path("unused"))
    by_title = panels(drawn[0])
    assert len(by_title) == 6
    for axes in by_title.values():
        bars = [bar for bar in axes.patches if bar.get_height() > 0]
        if not bars:
            assert axes.lines, axes.get_title(loc="left")
            continue
        low, high = axes.get_ylim()
        assert low == 0.0
        assert max(bar.get_y() + bar.get_height() for bar in bars) <= high
        assert all(max(line.get_ydata()) <= high for line in axes.lines)
    (row,) = result["rows"]
    shares = by_title["share of a step's time"].patches
    for side in (0, 1):
        of_side = [bar.get_height() for bar in shares if (bar.get_x() > -0.01) == bool(side)]
        assert sum(of_side) == pytest.approx(1.0)
    lines = by_title["tokens/s of a device"].lines
    assert lines[0].get_ydata()[0] == row["ours"]["tokens_per_s_per_device"]
