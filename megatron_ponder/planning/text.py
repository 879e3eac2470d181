"""The report of `plan_run` as text."""

from typing import Any

from megatron_ponder.planning.run import GIB
from megatron_ponder.tables import text_table

UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))
MOST_STAGES = 16
"""Stages that are all shown; of more, the ends and the largest between them."""


def as_text(result: dict[str, Any]) -> str:
    """Sections one below the other."""
    sections = [_head, _passes, _memory, _schedule, _traffic, _limits]
    if "fits" in result:
        sections.append(_fit)
    return "\n\n".join("\n".join(section(result)) for section in sections)


def _short(number: float) -> str:
    """Four digits and a unit."""
    size, unit = next((unit for unit in UNITS if abs(number) >= unit[0]), (1.0, ""))
    return f"{number / size:.4g} {unit}".rstrip()


def _gib(number: float) -> str:
    return f"{number / GIB:.2f}"


def _head(result: dict[str, Any]) -> list[str]:
    ranks, step, r = result["ranks"], result["step"], result["num_jacobi_iterations"]
    drawn = f", drawn from {r['drawn_from']}" if len(r["drawn_from"]) > 1 else ""
    return [
        f"{ranks['world_size']} ranks: tensor parallel {ranks['tensor_parallel']}, pipeline "
        f"{ranks['pipeline_parallel']} (layer chunks per stage {ranks['layer_chunks_per_stage']}), "
        f"context {ranks['context_parallel']}, data {ranks['data_parallel']}",
        f"parameters: {_short(result['parameters']['total'])} in the model, at most "
        f"{_short(max(result['parameters']['per_rank']))} on a rank",
        f"step: {step['sequences']} sequences, {_short(step['tokens'])} tokens in "
        f"{step['num_microbatches']} micro-batches per replica; whole run: "
        f"{_short(step['run_tokens'])} tokens",
        f"FLOPs: {_short(step['training_flops_per_token'])} per token, "
        f"{_short(step['training_flops'])} per step, "
        f"and {_short(step['recomputed_flops'])} recomputed",
        f"R: {r['planned_for']}{drawn}; everything below is for R = {r['planned_for']}",
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
    header = ["pass", "slots/token", "output slots", "gradient", "FLOPs/sequence", "share"]
    return ["passes of a forward", *text_table(header, rows)]


def _memory(result: dict[str, Any]) -> list[str]:
    stages = result["memory"]
    if len(stages) > MOST_STAGES:
        largest = max(stages[2:-1], key=lambda row: row["total"])
        stages = [*stages[:2], largest, stages[-1]]
    keys = ("parameters", "gradients", "optimizer", "activations", "total")
    rows = [
        [
            *(str(row[key]) for key in ("stage", "layers")),
            *(_gib(row[key]) for key in keys),
            str(row["num_alive"]),
        ]
        for row in stages
    ]
    header = ["stage", "layers", "weights", "gradients", "optimizer", "step", "total", "alive"]
    return [
        "memory of a rank, GiB, without CUDA, libraries and fragmentation (step: activations, and",
        "what a backward needs; alive: micro-batches times chunks that wait for their backward)",
        *text_table(header, rows),
    ]


def _schedule(result: dict[str, Any]) -> list[str]:
    schedule = result["schedule"]
    return [
        f"{schedule['num_chunks']} pipeline chunks x {schedule['num_microbatches']} micro-batches, "
        f"bubble {schedule['bubble']:.1%} ({schedule['bubble_if_chunks_were_equal']:.1%} if all "
        "chunks cost the same)",
        f"compute: {schedule['computing_s']:.4g} s per step at the assumed rate, without "
        "communication and the optimizer",
    ]


def _traffic(result: dict[str, Any]) -> list[str]:
    kinds = ("tensor", "context", "pipeline", "data", "embedding")
    most = {kind: max(stage[kind] for stage in result["sent_bytes"]) for kind in kinds}
    parts = ", ".join(f"{kind} {_gib(number)}" for kind, number in most.items() if number)
    return [f"sent per step by the rank that sends most, GiB: {parts or 'nothing'}"]


def _limits(result: dict[str, Any]) -> list[str]:
    return ["limits (* cannot be larger)"] + [
        f" {'*' if limit['binds'] else ' '} {limit['name']} {limit['now']} of {limit['most']}: "
        f"{limit['why']}"
        for limit in result["limits"]
    ]


def _fit(result: dict[str, Any]) -> list[str]:
    available = result["device_memory_gib"]
    peak = max(row["total_gib"] for row in result["memory"])
    if result["fits"]:
        return [f"fits: {peak:.2f} of {available:g} GiB"]
    lines = [f"DOES NOT FIT: {peak:.2f} GiB on devices of {available:g} GiB. Single changes:"]
    for remedy in result["remedies"]:
        share = remedy["recomputed_flops_share"]
        lines.append(
            f"  {'fits' if remedy['fits'] else '    '} {remedy['total_gib']:9.2f} GiB  "
            f"{remedy['change']}{f'  (+{share:.0%} FLOPs)' if share else ''}"
        )
    if not any(remedy["fits"] for remedy in result["remedies"]):
        lines.append("no single change is enough: combine the first ones")
    return lines
