"""Processes that call functions they are given: the one way benchmarks run sides and ranks.

A side of a comparison gets a process so that it has its own libraries and its own peak memory, and
so that running out of memory ends the side only. Ranks are several such processes, connected by
torch.distributed. A process lives as long as its block; `held` keeps models between calls.
"""

import contextlib
import importlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_ponder.errors import BackendError, ConfigError, PonderError
from megatron_ponder.runtime.device import device
from megatron_ponder.runtime.distributed import shutdown

Held = dict[str, Any]
"""What a process keeps between calls, by name."""
PRELOADED = "benchmarks.preload"
"""Imported once, before processes are forked."""
EXIT_TIMEOUT_S = 30


class Processes:
    """Running processes, by rank."""

    def __init__(self, connections: list[Connection]) -> None:
        self._connections = connections

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Call `function(held, *arguments)` in every process; the results by rank.

        Args:
            function: of a module, which the process imports.
            arguments: picklable.

        Raises:
            PonderError: as raised in a process, or out of memory.
        """
        for connection in self._connections:
            connection.send((function, arguments))
        return [self._receive(connection) for connection in self._connections]

    def _receive(self, connection: Connection) -> Any:
        try:
            answer = connection.recv()
        except EOFError:
            raise ConfigError(
                "a process ended early (its message is above). If there is none, it most likely "
                "ran out of memory: give a smaller model, --micro-batch-size or --seq-length."
            ) from None
        if isinstance(answer, PonderError):
            raise answer
        return answer


@contextlib.contextmanager
def processes(name: str, size: int = 1, num_threads: int | None = None) -> Iterator[Processes]:
    """Start processes; they end with the block.

    Args:
        name: for messages.
        size: how many; more than one are ranks of one torch.distributed job.
        num_threads: of each; None: torch's choice.
    """
    context: Any = multiprocessing.get_context("spawn")
    if not torch.cuda.is_available():  # a fork that imported CUDA's users may not use it
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PRELOADED])
    started, connections = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(size):
                here, there = context.Pipe()
                arguments = (name, rank, size, num_threads, str(Path(folder, "store")), there)
                # Not daemonic: megatron-core's checkpoint writer starts processes of its own.
                started.append(context.Process(target=_serve, args=arguments))
                started[-1].start()
                there.close()
                connections.append(here)
            yield Processes(connections)
        finally:
            for connection in connections:
                connection.close()
            for process in started:
                process.join(EXIT_TIMEOUT_S)
                process.kill()


def _serve(
    name: str,
    rank: int,
    size: int,
    num_threads: int | None,
    store: str,
    connection: Connection,
) -> None:
    """Body of a process."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(variable, None)  # of the process that started this one
    if size > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    importlib.import_module(PRELOADED)  # a spawned process has not imported it

    if num_threads is not None:
        torch.set_num_threads(num_threads)
    if size > 1:
        is_cuda = torch.cuda.is_available()
        if is_cuda:
            torch.cuda.set_device(device())
        dist.init_process_group(
            "nccl" if is_cuda else "gloo",
            store=dist.FileStore(store, size),
            rank=rank,
            world_size=size,
        )
    held: Held = {}
    with contextlib.suppress(EOFError):
        while True:
            function, arguments = connection.recv()
            connection.send(_answer(name, function, held, arguments))
    held.clear()
    shutdown()


def _answer(name: str, function: Callable[..., Any], held: Held, arguments: tuple[Any, ...]) -> Any:
    """The result, or the error that the asking process is to raise."""
    try:
        return function(held, *arguments)
    except torch.OutOfMemoryError as error:
        return BackendError(
            f"{name} ran out of the device's memory ({str(error).split('.')[0]}): give a smaller "
            "--micro-batch-size or --seq-length."
        )
    except PonderError as error:
        return error
