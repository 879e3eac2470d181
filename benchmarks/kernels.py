"""Each kernel beside its torch form and its eager form, at the shape of a model.

    eager    ordinary operations, differentiated by autograd (tests/reference/kernels.py)
    torch    the function of `kernels/` on torch
    triton   the same function on Triton, on a CUDA device, if it has such a form

Forward and backward are timed separately. Bytes are the least that the formula moves, so that their
rate compares with that of a copy. The error is the largest difference of an output or a gradient
from the eager form in fp64, over its largest entry. Without CUDA Triton is not timed: only its
interpreter would run.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.commands import KernelsOptions
from benchmarks.kernel_cases import KernelCase, build_cases, sizes_of
from benchmarks.timing import copy_bytes_per_s, has_triton_on_cuda, time_s
from megatron_ponder import log
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.schema import CheckpointConfig, RunConfig
from megatron_ponder.errors import ConfigError
from megatron_ponder.kernels.dispatch import Kernels, kernels_chosen
from megatron_ponder.runtime.device import device

NOT_TIMED = "Triton was not timed: it needs a CUDA device (tests run it in its interpreter)."


def measure(options: KernelsOptions, config: RunConfig) -> dict[str, Any]:
    """Time every kernel, or those that are asked for.

    Args:
        options: which.
        config: as given; its shape, micro-batch and precision are used.

    Raises:
        ConfigError: no kernel has the name.
    """
    config = resolve(dataclasses.replace(config, checkpoint=CheckpointConfig()), world_size=1)
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    cases = build_cases(sizes_of(config), dtype, torch.device(device()))
    unknown = set(options.only) - {case.name for case in cases}
    if unknown:
        known = ", ".join(f'"{case.name}"' for case in cases)
        raise ConfigError(f"--only {' '.join(sorted(unknown))}: kernels are {known}.")
    cases = [case for case in cases if not options.only or case.name in options.only]
    times_triton = has_triton_on_cuda()
    rows = {}
    with log.progress(len(cases), "benchmark", " kernels") as bar:
        for case in cases:
            rows[case.name] = measure_case(case, times_triton)
            bar.update()
    return report.environment(config) | {
        "copy_gb_per_s": copy_bytes_per_s() / 1e9,
        "triton": None if times_triton else NOT_TIMED,
        "kernels": rows,
    }


def measure_case(case: KernelCase, times_triton: bool) -> dict[str, Any]:
    """One kernel in all its forms."""
    chosen: dict[str, tuple[Kernels, Callable[..., Any]]] = {
        "eager": ("torch", case.eager),
        "torch": ("torch", case.kernel),
    }
    if times_triton and case.has_triton:
        chosen["triton"] = "triton", case.kernel
    exact = results(case, case.eager, torch.float64)
    forms: dict[str, dict[str, float]] = {}
    for name, (kernels, function) in chosen.items():
        with kernels_chosen(kernels):
            error = largest_error(results(case, function), exact)
            forms[name] = _time(case, function) | {"error": error}
    for name, row in forms.items():
        row["eager_over_this"] = forms["eager"]["ms"] / forms[name]["ms"]
    return {"has_triton": case.has_triton, "forms": forms}


def _time(case: KernelCase, function: Callable[..., Any]) -> dict[str, float]:
    """Milliseconds, and GB/s of the bytes that must be moved."""
    inputs = _leaves(case, None)
    # Elements are counted in the run's dtype; other inputs are in fp32.
    size = min(x.element_size() for x in inputs.values() if x.is_floating_point())
    forward_s = time_s(lambda: function(*inputs.values()))
    times = {"forward_ms": 1e3 * forward_s, "backward_ms": 0.0}
    num_bytes = case.forward_values * size
    if case.leaves:
        outputs = _as_tuple(function(*inputs.values()))
        gradients = [torch.ones_like(y) for y in outputs]
        leaves = [inputs[name] for name in case.leaves]
        backward_s = time_s(
            lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)
        )
        times["backward_ms"] = 1e3 * backward_s
        num_bytes += case.backward_values * size
    times["ms"] = times["forward_ms"] + times["backward_ms"]
    times["gb_per_s"] = num_bytes / times["ms"] / 1e6
    return times


def results(
    case: KernelCase, function: Callable[..., Any], dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Outputs, and gradients by the leaves for a fixed gradient of the outputs."""
    inputs = _leaves(case, dtype)
    outputs = _as_tuple(function(*inputs.values()))
    if not case.leaves:
        return list(outputs)
    generator = torch.Generator(outputs[0].device).manual_seed(2)
    rounded = case.inputs[case.leaves[0]].dtype  # also where the eager form runs in fp64
    gradients = [
        torch.randn(y.shape, generator=generator, device=y.device).to(rounded).to(y.dtype)
        for y in outputs
    ]
    leaves = [inputs[name] for name in case.leaves]
    return [*outputs, *torch.autograd.grad(outputs, leaves, gradients)]


def _leaves(case: KernelCase, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Copies of the inputs, which kernels may overwrite."""
    copies = {
        name: x.to(dtype, copy=True) if dtype and x.is_floating_point() else x.clone()
        for name, x in case.inputs.items()
    }
    return {name: x.requires_grad_(name in case.leaves) for name, x in copies.items()}


def _as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def largest_error(actual: list[Tensor], exact: list[Tensor]) -> float:
    """Largest difference over the largest exact entry, over all tensors."""
    with torch.no_grad():
        return max(
            float((a.double() - e).abs().max() / e.abs().max().clamp_min(1e-30))
            for a, e in zip(actual, exact, strict=True)
        )


def as_text(result: dict[str, Any]) -> str:
    """A result as a table."""
    copy = result["copy_gb_per_s"]
    rows = [
        (
            name if form == "eager" else "",
            form,
            *(row[key] for key in ("forward_ms", "backward_ms", "gb_per_s")),
            report.percent(row["gb_per_s"] / copy),
            f"{row['eager_over_this']:.3f}",
            f"{row['error']:.1e}",
        )
        for name, kernel in result["kernels"].items()
        for form, row in kernel["forms"].items()
    ]
    header = ("kernel", "form", "forward ms", "backward ms", "GB/s", "of copy", "eager/this")
    text = f"{report.heading(result)}; copy {copy:.4g} GB/s\n\n"
    text += report.table((*header, "error"), rows)
    return text + (f"\n\n{result['triton']}" if result["triton"] else "")
