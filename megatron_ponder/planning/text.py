"""The report of `plan_run` for people."""

from typing import Any

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
GIB = 1 << 30


def as_text(result: dict[str, Any]) -> str:
    """Sections one below the other."""
    sections = [
        _head(result),
        _passes(result),
        _memory(result),
        _schedule(result),
        _traffic(result),
        _limits(result),
    ]
    if "fits" in result:
        sections.append(_fit(result))
    return "\n\n".join("\n".join(lines) for lines in sections)


def _short(number: float) -> str:
    """Four digits and a unit."""
    for size, unit in UNITS:
        if abs(number) >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.4g}"


def _gib(number: float) -> str:
    return f"{number / GIB:.2f}"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    """Right-aligned columns."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    return [
        "  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in [header, *rows]
    ]


def _head(result: dict[str, Any]) -> list[str]:
    ranks, step, r = result["ranks"], result["step"], result["num_jacobi_iterations"]
    drawn = f", drawn from {r['drawn_from']}" if len(r["drawn_from"]) > 1 else ""
    return [
        f"{ranks['world_size']} ranks: tensor parallel {ranks['tensor_parallel']}, pipeline "
        f"{ranks['pipeline_parallel']} (layer chunks per stage {ranks['layer_chunks_per_stage']}), "
        f"context {ranks['context_parallel']}, data {ranks['data_parallel']}",
        f"parameters: {_short(result['parameters']['total'])} in the model, "
        f"{_short(max(result['parameters']['per_rank']))} on the rank that has most",
        f"step: {step['sequences']} sequences, {_short(step['tokens'])} tokens in "
        f"{step['num_microbatches']} micro-batches per replica; the run: "
        f"{_short(step['run_tokens'])} tokens",
        f"FLOPs: {_short(step['training_flops_per_token'])} per token, "
        f"{_short(step['training_flops'])} per step, "
        f"and {_short(step['recomputed_flops'])} recomputed",
        f"R: {r['planned_for']}{drawn}; what follows is for R = {r['planned_for']}",
    ]


def _passes(result: dict[str, Any]) -> list[str]:
    rows = [
        [
            str(row["index"] + 1),
            str(row["slots_per_token"]),
            ",".join(map(str, row["output_slots"])),
            "yes" if row["has_gradient"] else "no",
            _short(row["forward_flops"]),
            f"{row['share']:.1%}",
        ]
        for row in result["passes"]
    ]
    header = ["pass", "slots/token", "read stages", "gradient", "FLOPs/sequence", "share"]
    return ["passes of a forward", *table(header, rows)]


def _memory(result: dict[str, Any]) -> list[str]:
    keys = ("parameters", "gradients", "optimizer", "activations", "total")
    rows = [
        [
            str(row["stage"]),
            str(row["layers"]),
            *(_gib(row[k]) for k in keys),
            str(row["num_alive"]),
        ]
        for row in _shown(result["memory"])
    ]
    header = ["stage", "layers", "weights", "gradients", "optimizer", "step", "total", "alive"]
    return [
        "memory of a rank, GiB (step: activations and what a backward needs; alive: micro-batches",
        "times chunks that wait for their backward then; without CUDA, libraries, fragmentation)",
        *table(header, rows),
    ]


def _shown(stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All stages, or of many the ends and the fullest of the others."""
    if len(stages) <= 16:
        return stages
    fullest = max(stages[1:-1], key=lambda row: row["total"])
    return [stages[0], stages[1], fullest, stages[-1]]


def _schedule(result: dict[str, Any]) -> list[str]:
    schedule = result["schedule"]
    return [
        f"{schedule['num_chunks']} pipeline chunks x {schedule['num_microbatches']} micro-batches, "
        f"bubble {schedule['bubble']:.1%} ({schedule['bubble_if_chunks_were_equal']:.1%} if all "
        "chunks cost the same)",
        f"computing: {schedule['computing_s']:.4g} s per step at the assumed rate, without "
        "communication and the optimizer",
    ]


def _traffic(result: dict[str, Any]) -> list[str]:
    kinds = ("tensor", "context", "pipeline", "data", "embedding")
    most = {kind: max(stage[kind] for stage in result["sent_bytes"]) for kind in kinds}
    parts = ", ".join(f"{kind} {_gib(n)}" for kind, n in most.items() if n)
    return [f"sent per step by the rank that sends most, GiB: {parts or 'nothing'}"]


def _limits(result: dict[str, Any]) -> list[str]:
    lines = ["limits (* cannot be larger)"]
    for limit in result["limits"]:
        mark = "*" if limit["binds"] else " "
        lines.append(f" {mark} {limit['name']} {limit['now']} of {limit['most']}: {limit['why']}")
    return lines


def _fit(result: dict[str, Any]) -> list[str]:
    available = result["device_memory_gib"]
    fullest = max(row["total_gib"] for row in result["memory"])
    if result["fits"]:
        return [f"fits: {fullest:.2f} of {available:g} GiB"]
    lines = [f"DOES NOT FIT: {fullest:.2f} GiB on devices of {available:g} GiB. One change each:"]
    lines += [
        f"  {'fits' if remedy['fits'] else '    '} {remedy['total_gib']:9.2f} GiB  "
        f"{remedy['change']}{_recomputed(remedy['recomputed_flops_share'])}"
        for remedy in result["remedies"]
    ]
    if not any(remedy["fits"] for remedy in result["remedies"]):
        lines.append("no single change is enough: combine the first ones")
    return lines


def _recomputed(share: float) -> str:
    """What a change costs in products computed again."""
    return f"  (+{share:.0%} FLOPs)" if share else ""
