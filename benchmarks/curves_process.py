"""Ranks that build models, take training steps and measure their memory when asked.

Unlike the process of process.py, which is one model's for its life, these hold several models at
once, so that a base and one point after the other are timed in turns without starting a process
for each, and they come in groups of any size. A rank computes with one thread on CPU.

Left out: what is built and in which order (curves.py).
"""

import contextlib
import dataclasses
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_ponder import log
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.config.schema import ParallelConfig
from megatron_ponder.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankGroup:
    """Processes that work together; every question goes to all of them."""

    connections: tuple[Connection, ...]

    def _ask(self, *question: Any) -> list[Any]:
        for connection in self.connections:
            connection.send(question)
        answers = []
        for connection in self.connections:
            try:
                answers.append(connection.recv())
            except EOFError:
                raise ConfigError(
                    "a process ended early (its message is above); if there is none, most likely "
                    "out of memory: give a smaller base, or fewer --factors."
                ) from None
            if isinstance(answers[-1], ConfigError):
                raise answers[-1]
        return answers

    def build(self, name: str, config: ResolvedConfig) -> None:
        """Build a model; models that are held at once must have one layout.

        Raises:
            ConfigError: the settings cannot work.
        """
        self._ask("build", name, config)

    def take_steps(self, name: str, number: int) -> float:
        """Train; the seconds of the slowest rank."""
        return max(self._ask("take_steps", name, number))

    def measure_memory(self, name: str) -> list[tuple[int, int]]:
        """Take a step; bytes held between steps and the most that a step adds, of each rank."""
        return self._ask("measure_memory", name)

    def drop(self, name: str) -> None:
        """Forget a model."""
        self._ask("drop", name)


@contextlib.contextmanager
def rank_group(size: int) -> Iterator[RankGroup]:
    """Start a group; it ends with the block.

    Args:
        size: processes.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        connections = []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = (rank, size, str(Path(folder, "store")), there)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            there.close()
            stack.callback(process.kill)
            stack.callback(process.join, timeout=30)
            stack.callback(here.close)
            connections.append(here)
        yield RankGroup(connections=tuple(connections))


def _work(rank: int, size: int, store_path: str, connection: Connection) -> None:
    """Body of a rank."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    # torch's profiler reports every start and stop, and memory that it has not seen allocated.
    os.environ.update(KINETO_LOG_LEVEL="99", TORCH_CPP_LOG_LEVEL="ERROR")
    log.configure()  # before the imports below, some of which warn
    import torch
    import torch.distributed as dist

    from megatron_ponder.runtime.device import device
    from megatron_ponder.runtime.distributed import shutdown

    is_cuda = torch.cuda.is_available()
    if is_cuda:
        torch.cuda.set_device(device())
    else:
        torch.set_num_threads(1)
    store = dist.FileStore(store_path, size)
    dist.init_process_group("nccl" if is_cuda else "gloo", store=store, rank=rank, world_size=size)
    models = _Models()
    with contextlib.suppress(EOFError):
        while True:
            name, *arguments = connection.recv()
            try:
                connection.send(getattr(models, name)(*arguments))
            except ConfigError as error:
                connection.send(error)
    shutdown()


class _Models:
    """One rank's models, by name."""

    def __init__(self) -> None:
        self._steps: dict[str, Callable[[], None]] = {}
        self._training_states: dict[str, Any] = {}
        self._layout: ParallelConfig | None = None

    def build(self, name: str, config: ResolvedConfig) -> None:
        """Model, optimizer and batches, in their layout."""
        from benchmarks.steps import random_batches
        from megatron_ponder.runtime.distributed import initialize, leave_layout
        from megatron_ponder.train.run import build_training_state
        from megatron_ponder.train.step import train_step

        if config.parallel != self._layout:
            assert not self._training_states, "models of one layout at a time"
            leave_layout()
            initialize(config.parallel, config.training.seed)
            self._layout = config.parallel
        training_state, batches = build_training_state(config), random_batches(config)

        def step() -> None:
            train_step(config, training_state, batches, iteration=1, wants_stop=False).fetch()

        self._training_states[name], self._steps[name] = training_state, step

    def take_steps(self, name: str, number: int) -> float:
        """Seconds from a common start to this rank's end."""
        import torch
        import torch.distributed as dist

        is_cuda = torch.cuda.is_available()
        dist.barrier()
        if is_cuda:
            torch.cuda.synchronize()
        start_s = time.perf_counter()
        for _ in range(number):
            self._steps[name]()
        if is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start_s

    def measure_memory(self, name: str) -> tuple[int, int]:
        """Bytes held, and added by a step."""
        from benchmarks.step_memory import held_bytes, step_bytes

        held = sum(held_bytes(self._training_states[name]).values())
        return held, step_bytes(self._steps[name])

    def drop(self, name: str) -> None:
        """Forget a model, cycles included."""
        import gc

        import torch

        del self._steps[name], self._training_states[name]
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
