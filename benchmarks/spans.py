"""When a pipeline rank computes, through megatron-core's own timers; how long a message takes.

megatron-core's schedules start and stop named timers of `config.timers` around every forward and
backward, and around much else that is of no interest here.
"""

import time

import torch
import torch.distributed as dist

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.runtime.distributed import process_groups

COMPUTATIONS = ("forward-compute", "backward-compute")
STEP = "forward-backward"
ROUND_TRIPS = 30


class SpanTimers:
    """What megatron-core's config takes as `timers`."""

    def __init__(self) -> None:
        self.spans: list[tuple[float, float]] = []

    def __call__(self, name: str, log_level: int | None = None) -> "_Timer":
        """The timer of that name."""
        return _Timer(self, name)

    def take(self) -> list[tuple[float, float]]:
        """The spans since the last call, in order."""
        spans, self.spans = self.spans, []
        return spans


class _Timer:
    """One named timer; those of a kind do not overlap on a rank."""

    _begin_s = 0.0

    def __init__(self, timers: SpanTimers, name: str) -> None:
        self._timers, self._name = timers, name

    def start(self, barrier: bool = False) -> None:
        """Begin a span; all ranks begin a step together."""
        if self._name == STEP:
            dist.barrier()
        if self._name in COMPUTATIONS:
            _Timer._begin_s = time.perf_counter()

    def stop(self, barrier: bool = False) -> None:
        """End it."""
        if self._name in COMPUTATIONS:
            self._timers.spans.append((_Timer._begin_s, time.perf_counter()))


def message_latency_s(config: ResolvedConfig) -> float:
    """Time from sending to arrival of one hidden state between neighbouring stages, the median.

    Args:
        config: resolved.
    """
    group = process_groups().pp
    rank, size = group.rank(), group.size()
    rows = config.data.seq_length // config.parallel.context_parallel_size
    if config.parallel.sequence_parallel:
        rows //= config.parallel.tensor_model_parallel_size
    slots_per_token = config.method.num_latent_thoughts + 1
    shape = (rows * slots_per_token, config.training.micro_batch_size, config.model.hidden_size)
    message = torch.zeros(shape, dtype=torch.bfloat16 if config.training.bf16 else torch.float32)
    times = []
    dist.barrier()
    for _ in range(ROUND_TRIPS):
        begin_s = time.perf_counter()
        if rank == 0:
            dist.send(message, dist.get_global_rank(group, 1), group)
            dist.recv(message, dist.get_global_rank(group, 1), group)
        elif rank == 1:
            dist.recv(message, dist.get_global_rank(group, 0), group)
            dist.send(message, dist.get_global_rank(group, 0), group)
        times.append((time.perf_counter() - begin_s) / 2)
    assert size > 1
    return sorted(times)[len(times) // 2]
