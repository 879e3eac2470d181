"""What a training benchmark found, as text and as a picture."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def as_table(result: dict[str, Any]) -> str:
    """The figures of `benchmark_training` for people."""
    lines = [
        f"{result['device']}, {result['threads']} threads, torch {result['versions']['torch']}, "
        f"megatron-core {result['versions']['megatron_core']}, {result['date']}",
        "",
        f"{'':>12} {'ms/step':>10} {'tokens/s':>12} {'TFLOP/s':>10} {'memory GiB':>11}",
    ]
    for name in ("ours", "reference"):
        if name in result:
            row = result[name]
            tflops = "-" if row["tflops"] is None else f"{row['tflops']:.4g}"
            lines.append(
                f"{name:>12} {row['ms_per_step']:>10.1f} {row['tokens_per_s']:>12,.0f} "
                f"{tflops:>10} {row['step_memory_gib']:>11.3f}"
            )
    if "speedup" in result:
        speedup = result["speedup"]
        lines += [
            "",
            f"reference / ours: {speedup['median']:.3f} (median of rounds, from "
            f"{speedup['least']:.3f} to {speedup['largest']:.3f}); above 1: ours is faster",
        ]
    if result["by_r"]:
        lines += ["", f"{'R':>12} {'ms/step':>10} {'memory GiB':>11}"]
        lines += [
            f"{row['num_jacobi_iterations']:>12} {row['ms_per_step']:>10.1f} "
            f"{row['step_memory_gib']:>11.3f}"
            for row in result["by_r"]
        ]
    return "\n".join(lines)


def draw_by_r(result: dict[str, Any], path: Path) -> None:
    """Memory and time of a step over R, as a PNG."""
    rows = result["by_r"]
    r = [row["num_jacobi_iterations"] for row in rows]
    figure = Figure(figsize=(9, 3.5), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots(1, 2)
    for axis, key, label in (
        (axes[0], "step_memory_gib", "memory of a step (GiB)"),
        (axes[1], "ms_per_step", "time of a step (ms)"),
    ):
        axis.plot(r, [row[key] for row in rows], marker="o", color="#d97706")
        axis.set(xlabel="Jacobi iterations R", ylabel=label, xticks=r)
        axis.set_ylim(bottom=0)
        axis.grid(color="#e5e7eb")
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    FigureCanvasAgg(figure).print_png(unfinished)
    unfinished.replace(path)
