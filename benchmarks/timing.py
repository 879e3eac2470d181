"""Time of a call on the device, and the device's best rates of matmuls and copies.

On CUDA Triton's `do_bench` measures with events and flushes the L2 cache before each call; on the
CPU, and on CUDA without Triton, torch's benchmark timer measures blocks of calls.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch.utils.benchmark import Timer

from megatron_ponder.runtime.capabilities import find_capabilities
from megatron_ponder.runtime.device import device

MIN_RUN_S = 0.15
"""Time over which the benchmark timer repeats a call."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceRates:
    """Best rates of the device, measured."""

    gemm_tflops: float
    """Matmuls, 2 m n k operations each, in TFLOP/s."""
    copy_gb_per_s: float
    """Bytes read and written by a copy, in 1e9 per second."""

    def floor_s(self, flops: float, num_bytes: float) -> float:
        """The least time of an operation: its arithmetic or its traffic, whichever is longer."""
        return max(flops / (self.gemm_tflops * 1e12), num_bytes / (self.copy_gb_per_s * 1e9))


def synchronize_device() -> None:
    """Block until the device has finished its work; nothing on the CPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def has_triton_on_cuda() -> bool:
    """Whether Triton compiles for this device (without one only its interpreter runs)."""
    found = find_capabilities()
    return found.has_cuda and found.triton.is_usable


def time_s(run: Callable[[], object], *, is_best: bool = False) -> float:
    """Seconds of one call: the median, or the least of all measured."""
    if has_triton_on_cuda():
        from triton.testing import do_bench

        return 1e-3 * float(do_bench(run, return_mode="min" if is_best else "median"))
    timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
    measured = timer.blocked_autorange(min_run_time=MIN_RUN_S)
    return min(measured.times) if is_best else measured.median


def measure_rates(dtype: torch.dtype, shapes: list[tuple[int, int, int]]) -> DeviceRates:
    """Measure both rates.

    Args:
        dtype: of the matrices.
        shapes: (m, k, n) of the matmuls to try; the fastest rate counts.
    """
    best_flops_per_s = max(_flops_per_s(dtype, shape) for shape in shapes)
    return DeviceRates(gemm_tflops=best_flops_per_s / 1e12, copy_gb_per_s=copy_bytes_per_s() / 1e9)


def copy_bytes_per_s() -> float:
    """Bytes read and written per second by a copy that is larger than the caches."""
    size = (1 << 30) if device().type == "cuda" else (1 << 27)
    source = torch.empty(size, dtype=torch.uint8, device=device()).zero_()
    target = torch.empty_like(source)
    return 2 * size / time_s(lambda: target.copy_(source), is_best=True)


def _flops_per_s(dtype: torch.dtype, shape: tuple[int, int, int]) -> float:
    m, k, n = shape
    a = torch.randn(m, k, device=device(), dtype=dtype)
    b = torch.randn(k, n, device=device(), dtype=dtype)
    out = torch.empty(m, n, device=device(), dtype=dtype)
    return 2 * m * k * n / time_s(lambda: torch.mm(a, b, out=out), is_best=True)
