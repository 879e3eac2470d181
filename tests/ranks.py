"""Runs a function on several ranks (gloo, or nccl where there is CUDA), for tests of layouts.

Ranks are forked from a server process that has imported torch and megatron-core once, so that a
layout starts in a second instead of ten. They meet through a file store. A rank that fails, dies or
hangs fails the test with every rank's traceback (a hang: with every rank's stack).

Where there is CUDA ranks are spawned instead, because a fork of a process that has so much as
asked whether there is a device cannot use it; and where there are more ranks than devices, they see
none and run on the CPU.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

DEFAULT_TIMEOUT_S = 300

FORK = multiprocessing.get_context("forkserver")
FORK.set_forkserver_preload(["tests.ranks_preload"])
_spawn = multiprocessing.get_context("spawn")


class RanksFailed(AssertionError):
    """At least one rank did not finish; the message holds what each of them said."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> list[Any]:
    """Call `function(*args)` on every rank and return the results by rank.

    Args:
        function: a module-level function; torch.distributed is initialised when it is called. Its
            result is passed through torch.save.
        world_size: number of ranks.
        args: picklable arguments.
        timeout_s: wall-clock limit for all of it.

    Raises:
        RanksFailed: a rank raised, died or did not finish in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        context: Any = _spawn if torch.cuda.is_available() else FORK
        ranks = [
            context.Process(target=_rank_main, args=(function, args, rank, world_size, folder))
            for rank in range(world_size)
        ]
        with _devices_for(world_size):
            for process in ranks:
                process.start()
        deadline = time.monotonic() + timeout_s
        hung = False
        while any(process.is_alive() for process in ranks):
            failed = any(process.exitcode not in (None, 0) for process in ranks)
            if time.monotonic() > deadline or failed:
                hung = not failed
                _stop(ranks, grace_s=0 if hung else 5)
                break
            time.sleep(0.02)
        if any(process.exitcode != 0 for process in ranks):
            raise RanksFailed(_report(ranks, Path(folder), hung, timeout_s))
        return [
            torch.load(Path(folder, f"result{rank}.pt"), map_location="cpu", weights_only=False)
            for rank in range(world_size)
        ]


@contextlib.contextmanager
def _devices_for(world_size: int) -> Iterator[None]:
    """What is started inside sees the CUDA devices if there is one for each rank, else none."""
    hidden = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    before = dict(os.environ)
    if world_size > torch.cuda.device_count():
        os.environ.update(hidden)
    try:
        yield
    finally:
        for name in hidden:
            os.environ.pop(name, None)
            os.environ.update({name: before[name]} if name in before else {})


def _rank_main(
    function: Callable[..., Any], args: tuple, rank: int, world_size: int, folder: str
) -> None:
    """What a rank does; its traceback or its stack goes to a file."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1"
    )
    be_like_a_fresh_process()
    with open(Path(folder, f"stack{rank}.txt"), "w") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack, all_threads=True)
        try:
            store = torch.distributed.FileStore(str(Path(folder, "store")), world_size)
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            torch.distributed.init_process_group(
                backend, store=store, rank=rank, world_size=world_size
            )
            result = function(*args)
            torch.save(result, Path(folder, f"result{rank}.pt"))
        except BaseException:
            Path(folder, f"error{rank}.txt").write_text(traceback.format_exc())
            # Not os._exit: processes that megatron-core's checkpoint writer left must end with us.
            sys.exit(1)


def be_like_a_fresh_process() -> None:
    """Undo what a forked process inherits from its server: threads, and how it starts others.

    Loader workers would be started by a forkserver of their own, which imports for seconds.
    """
    torch.set_num_threads(1)
    platforms_default = multiprocessing.get_all_start_methods()[0]
    multiprocessing.set_start_method(platforms_default, force=True)


def _stop(ranks: list, grace_s: float) -> None:
    """Give the others time to fail too, then write their stacks and end them."""
    deadline = time.monotonic() + grace_s
    while time.monotonic() < deadline and any(process.is_alive() for process in ranks):
        time.sleep(0.05)
    alive = [process for process in ranks if process.is_alive()]
    for process in alive:
        os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.5 if alive else 0)
    for process in alive:
        process.kill()
    for process in ranks:
        process.join()


def _report(ranks: list, folder: Path, hung: bool, timeout_s: float) -> str:
    """One section per rank: its error if it has one, else its stack."""
    lines = [f"ranks did not finish within {timeout_s} s" if hung else "a rank failed"]
    for rank, process in enumerate(ranks):
        error, stack = folder / f"error{rank}.txt", folder / f"stack{rank}.txt"
        text = error.read_text() if error.exists() else stack.read_text() if stack.exists() else ""
        lines.append(f"--- rank {rank}, exit code {process.exitcode}\n{text}")
    return "\n".join(lines)
