"""A process that takes training steps when asked, and says how long they took.

A benchmark gives each side one, so that neither has the other's libraries loaded, memory is each
one's own, and running out of it ends nothing but the side. What it runs is imported inside it,
after its log is set up. Left out: what a step is (steps.py).
"""

import contextlib
import multiprocessing
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from megatron_ponder import log
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.errors import BackendError, ConfigError, PonderError


class Side:
    """A running side, to be asked the questions that `_Worker` has methods for."""

    def __init__(self, name: str, connection: Connection) -> None:
        self._name = name
        self._connection = connection

    def ask(self, question: str, *arguments: Any) -> Any:
        """The answer.

        Raises:
            PonderError: the side cannot run with these settings, or ran out of memory.
        """
        self._connection.send((question, arguments))
        try:
            answer = self._connection.recv()
        except EOFError:
            raise ConfigError(
                f"the process of {self._name} died, most likely out of memory; give a smaller "
                "model, --micro-batch-size or --seq-length."
            ) from None
        if isinstance(answer, PonderError):
            raise answer
        return answer


@contextlib.contextmanager
def side(name: str, baseline: str, config: ResolvedConfig) -> Iterator[Side]:
    """Start a process with a model; it ends with the block.

    Args:
        name: for `benchmark.steps.build_steps`, as the next.
        baseline: what ours is compared with.
        config: resolved for one process.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    # No daemon: those may not start processes, as megatron-core's checkpoint writer does.
    process = context.Process(target=_work, args=(name, baseline, config, there))
    process.start()
    there.close()
    try:
        yield Side(name, here)
    finally:
        here.close()
        process.join(timeout=30)
        process.kill()


class _Worker:
    """What the process does; torch is imported when it is made."""

    def __init__(self, name: str, baseline: str, config: ResolvedConfig) -> None:
        from benchmarks.steps import build_steps
        from megatron_ponder.train.metrics import peak_memory_gib

        self._peak_memory_gib = peak_memory_gib
        self._baseline_gib = peak_memory_gib()
        self._steps = build_steps(name, baseline, config)
        self._iteration = 0

    def take_steps(self, num_steps: int) -> tuple[list[float], float, float]:
        """Loss of each, seconds of all, and seconds that a core worked for it."""
        from benchmarks.phases import synchronize_device

        synchronize_device()
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        losses = [self._steps.step(self._next()) for _ in range(num_steps)]
        synchronize_device()
        seconds, cpu_seconds = time.perf_counter() - start_s, time.process_time() - start_cpu_s
        return [read() for read in losses], seconds, cpu_seconds

    def memory(self) -> tuple[float, float]:
        """GiB before the model was built, and at the peak."""
        return self._baseline_gib, self._peak_memory_gib()

    def phases(self, num_steps: int) -> dict[str, float]:
        """Milliseconds by phase of the fastest step, which was disturbed least."""
        from benchmarks.phases import time_phases

        steps = [
            time_phases(lambda phase: self._steps.step(self._next(), phase))
            for _ in range(num_steps)
        ]
        return min(steps, key=lambda ms: ms["total"])

    def trace(self, path: str) -> None:
        """Write what a profiler saw of one step, for chrome://tracing or Perfetto."""
        from benchmarks.phases import trace_step

        trace_step(lambda phase: self._steps.step(self._next(), phase), path)

    def roofline(self) -> dict[str, Any]:
        """Passes of our model against the floor."""
        from benchmarks.roofline import measure_roofline

        return measure_roofline(self._ours())

    def save_checkpoints(self, num_saves: int) -> tuple[list[float], int]:
        """Seconds of each save, and bytes of a checkpoint."""
        from benchmarks.checkpoint import save_repeatedly

        return save_repeatedly(self._ours(), num_saves)

    def load_checkpoint(self) -> float:
        """Seconds to load it."""
        from benchmarks.checkpoint import load_once

        return load_once(self._ours())

    def _ours(self) -> Any:
        """This side's steps, which must be ours."""
        from benchmarks.steps import OurSteps

        assert isinstance(self._steps, OurSteps)
        return self._steps

    def _next(self) -> int:
        self._iteration += 1
        return self._iteration


def _work(name: str, baseline: str, config: ResolvedConfig, connection: Connection) -> None:
    """Body of the process."""
    log.configure(sys.stderr)  # before the imports below, some of which warn
    import torch

    from megatron_ponder.runtime.distributed import running

    # The baselines are plain PyTorch: nothing of ours is set up for them.
    is_ours = name == "ours"
    with running(config.parallel, config.training.seed) if is_ours else contextlib.nullcontext():
        worker: _Worker | None = None
        while True:
            try:
                question, arguments = connection.recv()
            except EOFError:
                return
            try:
                worker = worker or _Worker(name, baseline, config)
                answer = getattr(worker, question)(*arguments)
            except torch.OutOfMemoryError as error:
                answer = BackendError(
                    f"{name} ran out of the device's memory ({str(error).split('.')[0]}): give a "
                    "smaller --micro-batch-size or --seq-length."
                )
            except PonderError as error:
                answer = error
            connection.send(answer)
