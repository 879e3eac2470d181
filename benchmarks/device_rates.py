"""What the device can do at best, measured in a second: matrix products and copies.

    product   C = A B of two matrices, counted as 2 m n k operations
    copy      of one tensor to another, counted as bytes read and written

The best of several repetitions counts: the floor under a time is what the device can do, not what
it does while other processes disturb it.
"""

import dataclasses
import time
from collections.abc import Callable

import torch

from benchmarks.phases import synchronize_device
from megatron_ponder.runtime.device import device

REPETITIONS = 5
MIN_REPETITION_S = 0.03


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceRates:
    """Best rates of the device."""

    gemm_tflops: float
    """Matrix products, in TFLOP/s."""
    copy_gb_per_s: float
    """Bytes read and written, in 1e9 per second."""

    def floor_s(self, flops: float, num_bytes: float) -> float:
        """The least time of an operation: its arithmetic or its traffic, whichever is longer."""
        return max(flops / (self.gemm_tflops * 1e12), num_bytes / (self.copy_gb_per_s * 1e9))


def measure_rates(dtype: torch.dtype, shapes: list[tuple[int, int, int]]) -> DeviceRates:
    """Measure both.

    Args:
        dtype: of the matrices.
        shapes: (m, k, n) of the products to try; the fastest rate counts.
    """
    best_flops_per_s = max(_flops_per_s(dtype, shape) for shape in shapes)
    return DeviceRates(gemm_tflops=best_flops_per_s / 1e12, copy_gb_per_s=copy_bytes_per_s() / 1e9)


def best_time_s(run: Callable[[], object]) -> float:
    """Time of one call on the device: the best of a few repetitions, each long enough to time."""
    run()
    num_calls, best_s = 1, float("inf")
    for _ in range(REPETITIONS):
        while True:
            synchronize_device()
            begin_s = time.perf_counter()
            for _ in range(num_calls):
                run()
            synchronize_device()
            elapsed_s = time.perf_counter() - begin_s
            if elapsed_s >= MIN_REPETITION_S:
                break
            num_calls *= 2
        best_s = min(best_s, elapsed_s / num_calls)
    return best_s


def copy_bytes_per_s() -> float:
    """Bytes read and written per second by a copy that is larger than the caches."""
    size = (1 << 30) if device().type == "cuda" else (1 << 27)
    source = torch.empty(size, dtype=torch.uint8, device=device()).zero_()
    target = torch.empty_like(source)
    return 2 * size / best_time_s(lambda: target.copy_(source))


def _flops_per_s(dtype: torch.dtype, shape: tuple[int, int, int]) -> float:
    m, k, n = shape
    a = torch.randn(m, k, device=device(), dtype=dtype)
    b = torch.randn(k, n, device=device(), dtype=dtype)
    out = torch.empty(m, n, device=device(), dtype=dtype)
    return 2 * m * k * n / best_time_s(lambda: torch.mm(a, b, out=out))
