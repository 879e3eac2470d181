"""What a training benchmark found, as text and as a picture."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def as_table(result: dict[str, Any]) -> str:
    """The figures of `benchmark_training` for people."""
    names = [name for name in ("ours", result["baseline"]) if name in result]
    lines = [
        f"{result['device']}, {result['threads']} threads, torch {result['versions']['torch']}, "
        f"megatron-core {result['versions']['megatron_core']}, {result['date']}",
        "",
        f"{'':>12} {'ms/step':>10} {'tokens/s':>12} {'TFLOP/s':>10} {'MFU':>7} {'memory GiB':>11}",
    ]
    for name in names:
        row = result[name]
        tflops = "-" if row["tflops"] is None else f"{row['tflops']:.4g}"
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(
            f"{name:>12} {row['ms_per_step']:>10.1f} {row['tokens_per_s']:>12,.0f} "
            f"{tflops:>10} {mfu:>7} {row['step_memory_gib']:>11.3f}"
        )
    if result["peak_tflops"] is not None:
        lines += ["", f"MFU: {result['mfu_definition']}, {result['peak_tflops']} TFLOP/s."]
    else:
        lines += ["", "No MFU: the peak rate of this device or precision is not known."]
    for key, what in (("speedup", "time"), ("speedup_cpu_time", "time that a core worked")):
        if key in result:
            speedup = result[key]
            lines += [
                "",
                f"{what}, {result['baseline']} / ours: {speedup['median']:.3f} (median of rounds, "
                f"from {speedup['least']:.3f} to {speedup['largest']:.3f}); above 1: ours is "
                "faster",
            ]
    lines += ["", *_phases(result, names)]
    if result["roofline"] is not None:
        lines += ["", *roofline_lines(result["roofline"])]
    if result["by_r"]:
        lines += ["", f"{'R':>12} {'ms/step':>10} {'memory GiB':>11}"]
        lines += [
            f"{row['num_jacobi_iterations']:>12} {row['ms_per_step']:>10.1f} "
            f"{row['step_memory_gib']:>11.3f}"
            for row in result["by_r"]
        ]
    return "\n".join(lines)


def _phases(result: dict[str, Any], names: list[str]) -> list[str]:
    """Milliseconds by phase, of one step of each side that waits for the device in between."""
    phases = list(result[names[0]]["phases_ms"])
    header = f"{'ms by phase':>12} " + " ".join(f"{phase:>10}" for phase in phases)
    return [header] + [
        f"{name:>12} " + " ".join(f"{result[name]['phases_ms'][p]:>10.1f}" for p in phases)
        for name in names
    ]


def roofline_lines(roofline: dict[str, Any]) -> list[str]:
    """Passes against their floor."""
    rates = roofline["rates"]
    lines = [
        f"measured: products {rates['gemm_tflops']:.4g} TFLOP/s, copy "
        f"{rates['copy_gb_per_s']:.4g} GB/s",
        f"{'pass':>12} {'slots/token':>12} {'read':>5} {'GFLOP':>9} {'GB':>8} {'floor ms':>9} "
        f"{'forward ms':>11} {'reached':>8} {'backward ms':>12} {'share':>7}",
    ]
    for number, row in enumerate([*roofline["passes"], roofline["total"]], 1):
        name = str(number) if "slots_per_token" in row else "all"
        slots, outputs = row.get("slots_per_token", ""), row.get("outputs_per_token", "")
        lines.append(
            f"{name:>12} {slots:>12} {outputs:>5} "
            f"{row['gflops']:>9.4g} {row['gigabytes']:>8.3g} {row['floor_ms']:>9.4g} "
            f"{row['forward_ms']:>11.4g} {row['reached']:>8.1%} {row['backward_ms']:>12.4g} "
            f"{row['share']:>7.1%}"
        )
    return lines


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
    save_png(figure, path)


def save_png(figure: Figure, path: Path) -> None:
    """Write a picture under a temporary name and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}")
    FigureCanvasAgg(figure).print_png(unfinished)
    unfinished.replace(path)
