"""Each pass of a plan against its floor: FLOPs, bytes, the least time, the time it takes.

A pass is cut into matmuls and what lies between them. The floor of a piece is its arithmetic at the
measured rate of matmuls or its traffic at the measured rate of copies, whichever is longer. The
floor of the pass is the sum, since each piece starts when the one before has ended.

Traffic, in the dtype of the run: every piece reads its operands and writes its results once. What
lies between two matmuls counts as one fused kernel: residual add and norm (read stream and branch,
write sum and norm), rotary positions (read and write queries and keys), activation, embedding, loss
(reads the logits). Attention reads queries, keys and values and writes its output. So the floor
needs everything fused that can be fused without joining two matmuls.

Passes are timed one by one, with device synchronisation in between; the backward is cut where the
gradient of a pass's carry is complete. Left out: floors of the backward, more than one rank, and
recomputation.
"""

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.processes import Held
from benchmarks.steps import OurSteps
from benchmarks.timing import DeviceRates, measure_rates, synchronize_device
from megatron_ponder.config.resolved import ResolvedConfig, ResolvedModelConfig
from megatron_ponder.model.size import linear_modules
from megatron_ponder.ponder.plan import Pass, PassPlan
from megatron_ponder.ponder.training_plan import training_plan
from megatron_ponder.runtime.device import device

REPETITIONS = 3
"""Runs of all passes; the least time of each counts."""
SQUARE = {"cuda": 8192, "cpu": 1024}
"""By device: edge of the square matmul that is measured beside the model's own."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """A piece of a pass over one micro-batch."""

    name: str
    flops: float
    values: float
    """Elements read and written."""


def pass_operations(
    model: ResolvedModelConfig, plan: PassPlan, pass_: Pass, *, tokens: int, seq_length: int
) -> list[Operation]:
    """The pieces of a pass.

    Args:
        model: resolved.
        plan: that the pass belongs to.
        pass_: the pass.
        tokens: of the micro-batch.
        seq_length: tokens of each of its sequences.
    """
    h, v = model.hidden_size, model.vocab_size
    slots, output_slots = tokens * pass_.slots_per_token, tokens * pass_.outputs_per_token
    pieces = [Operation("input", 0, 2 * slots * h)]
    for layer in range(model.num_layers):
        is_last = layer == model.num_layers - 1
        behind = output_slots if is_last else slots
        pieces += _layer(model, slots, behind, seq_length * pass_.slots_per_token)
    pieces.append(Operation("residual and final norm", 0, 4 * output_slots * h))
    if pass_.mixes_embeddings:
        pieces += [
            _matmul("mixture: head", output_slots, h, v),
            Operation("mixture: softmax", 0, 2 * output_slots * v),
            _matmul("mixture: embeddings", output_slots, v, h),
        ]
    if plan.is_last(pass_):
        pieces += [_matmul("head", tokens, h, v), Operation("loss", 0, tokens * v)]
    return pieces


def _layer(
    model: ResolvedModelConfig, slots: int, behind: int, slots_per_sequence: int
) -> Iterator[Operation]:
    """The pieces of a layer; behind attention it works on `behind` slots."""
    h = model.hidden_size
    (_, qkv_width), (width, _), (_, mlp_width), (ffn, _) = linear_modules(model)
    keys_width = model.num_query_groups * model.kv_channels
    yield Operation("residual and norm", 0, 4 * slots * h)
    yield _matmul("QKV", slots, h, qkv_width)
    if model.position_embedding_type == "rope":
        yield Operation("rotary", 0, 2 * slots * (width + keys_width))
    yield Operation(
        "attention",
        2 * slots * slots_per_sequence * width,  # half of the square, two matmuls
        slots * (qkv_width + width),
    )
    yield _matmul("attention output", behind, width, h)
    # With a parallel residual the norm of the MLP is in the piece before attention.
    yield Operation("residual and norm", 0, (2 if model.parallel_residual else 4) * behind * h)
    yield _matmul("MLP in", behind, h, mlp_width)
    yield Operation("activation", 0, behind * (mlp_width + ffn))
    yield _matmul("MLP out", behind, ffn, h)


def _matmul(name: str, m: int, k: int, n: int) -> Operation:
    """[m, k] times weights [k, n]."""
    return Operation(name, 2 * m * k * n, m * k + k * n + m * n)


def measure_passes(held: Held, name: str) -> dict[str, Any]:
    """In a process: time every pass, forward and backward, and compare it with its floor.

    Args:
        held: what the process holds.
        name: of our side; its gradients are overwritten.

    Returns:
        `rates`, and for each of `passes` and for their `total`: `gflops`, `gigabytes`, `floor_ms`,
        `forward_ms`, `reached` (floor over forward), `backward_ms`, and its `share` of both times.
    """
    side: OurSteps = held[name]
    config = side.config
    method = side.training_state.model.method
    plan = training_plan(method, config.method.num_jacobi_iterations)
    bytes_per_value = 2 if config.training.bf16 else 4
    rates = _rates(config, plan)
    times = [_time_passes(side, plan) for _ in range(REPETITIONS)]
    forward = [min(column) for column in zip(*(f for f, _ in times), strict=True)]
    backward = [min(column) for column in zip(*(b for _, b in times), strict=True)]
    rows = []
    for pass_, forward_s, backward_s in zip(plan.passes, forward, backward, strict=True):
        pieces = pass_operations(
            config.model,
            plan,
            pass_,
            tokens=config.training.micro_batch_size * config.data.seq_length,
            seq_length=config.data.seq_length,
        )
        rows.append(
            {
                "slots_per_token": pass_.slots_per_token,
                "outputs_per_token": pass_.outputs_per_token,
                "gflops": sum(p.flops for p in pieces) / 1e9,
                "gigabytes": sum(p.values for p in pieces) * bytes_per_value / 1e9,
                "floor_ms": 1e3
                * sum(rates.floor_s(p.flops, p.values * bytes_per_value) for p in pieces),
                "forward_ms": 1e3 * forward_s,
                "backward_ms": 1e3 * backward_s,
            }
        )
    keys = ("gflops", "gigabytes", "floor_ms", "forward_ms", "backward_ms")
    total: dict[str, Any] = {key: sum(row[key] for row in rows) for key in keys}
    step_ms = total["forward_ms"] + total["backward_ms"]
    for row in [*rows, total]:
        row["reached"] = row["floor_ms"] / row["forward_ms"]
        row["share"] = (row["forward_ms"] + row["backward_ms"]) / step_ms
    return {"rates": dataclasses.asdict(rates), "passes": rows, "total": total}


def as_text(roofline: dict[str, Any]) -> str:
    """Passes against their floor, as a table."""
    rates = roofline["rates"]
    rows = [
        (
            str(number) if "slots_per_token" in row else "all",
            row.get("slots_per_token", ""),
            row.get("outputs_per_token", ""),
            *(row[key] for key in ("gflops", "gigabytes", "floor_ms", "forward_ms")),
            report.percent(row["reached"]),
            row["backward_ms"],
            report.percent(row["share"]),
        )
        for number, row in enumerate([*roofline["passes"], roofline["total"]], 1)
    ]
    header = ("pass", "slots/token", "outputs", "GFLOP", "GB", "floor ms", "forward ms", "reached")
    return (
        f"measured: matmuls {rates['gemm_tflops']:.4g} TFLOP/s, copy "
        f"{rates['copy_gb_per_s']:.4g} GB/s\n"
        + report.table((*header, "backward ms", "share"), rows)
    )


def _rates(config: ResolvedConfig, plan: PassPlan) -> DeviceRates:
    """Of the model's largest matmuls, and of a large square one."""
    tokens = config.training.micro_batch_size * config.data.seq_length * plan.max_slots_per_token
    edge = SQUARE[device().type]
    shapes = [(tokens, inputs, outputs) for inputs, outputs in linear_modules(config.model)]
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    return measure_rates(dtype, [*shapes, (edge, edge, edge)])


def _time_passes(side: OurSteps, plan: PassPlan) -> tuple[list[float], list[float]]:
    """Seconds of each pass's forward and of its backward (0 for a pass without a gradient)."""
    (model,) = side.training_state.model.modules
    batch = {name: tensor.to(device()) for name, tensor in next(side.batches).items()}
    forward: list[float] = []
    ends: dict[int, float] = {}
    carry: Tensor | None = None
    for pass_ in plan.passes:
        begin_s = _now()
        carry = model.forward_pass(pass_, plan, batch["tokens"], batch["labels"], carry)
        forward.append(_now() - begin_s)
        if carry.requires_grad and not plan.is_last(pass_):
            # Its gradient is complete when the later passes have had their backward.
            carry.register_hook(lambda _, index=pass_.index: ends.update({index + 1: _now()}))
    assert carry is not None
    begin_s = _now()
    with side.training_state.model.no_sync():
        carry.sum().backward()
    ends[plan.first_grad_pass] = _now()
    backward = []
    for pass_ in reversed(plan.passes):
        end_s = ends.get(pass_.index, begin_s)
        backward.append(end_s - begin_s)
        begin_s = end_s
    return forward, backward[::-1]


def _now() -> float:
    """Seconds, after a device synchronisation."""
    synchronize_device()
    return time.perf_counter()
