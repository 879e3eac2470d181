"""A process that takes training steps when asked, and says how long they took.

What it runs is imported inside it, after its log is set up. Left out: what a step is (train.py).
"""

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from megatron_ponder import log
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import ConfigError

Side = Callable[[int], tuple[Any, Any]]
"""A function of a number of steps: (loss of each, seconds); of 0: (GiB before the model was built,
peak GiB)."""


@contextlib.contextmanager
def side(name: str, config: RunConfig) -> Iterator[Side]:
    """Start a process with a model; it ends with the block.

    Args:
        name: for `benchmark.train.build_step`.
        config: resolved for one process.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_work, args=(name, config, there), daemon=True)
    process.start()
    there.close()

    def ask(num_steps: int) -> tuple[Any, Any]:
        here.send(num_steps)
        try:
            answer = here.recv()
        except EOFError:
            raise ConfigError(
                f"the process of {name} died, most likely out of memory; give a smaller model, "
                "--micro-batch-size or --seq-length."
            ) from None
        if isinstance(answer, ConfigError):
            raise answer
        return answer

    try:
        yield ask
    finally:
        here.close()
        process.join(timeout=30)
        process.kill()


def _work(name: str, config: RunConfig, connection: Connection) -> None:
    """Body of the process."""
    log.configure()  # before the imports below, some of which warn
    import torch

    from megatron_ponder.benchmark.train import build_step
    from megatron_ponder.runtime.distributed import running
    from megatron_ponder.train.metrics import peak_memory_gib

    wait_for_device = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    baseline_gib = peak_memory_gib()
    # The reference is plain PyTorch: nothing of ours is set up for it.
    is_ours = name == "ours"
    with running(config.parallel, config.training.seed) if is_ours else contextlib.nullcontext():
        try:
            step = build_step(name, config)
        except ConfigError as error:
            connection.recv()
            connection.send(error)
            return
        iteration = 0
        while True:
            try:
                num_steps = connection.recv()
            except EOFError:
                return
            if num_steps == 0:
                connection.send((baseline_gib, peak_memory_gib()))
                continue
            start_s = time.perf_counter()
            losses = [step(iteration + i) for i in range(1, num_steps + 1)]
            wait_for_device()
            iteration += num_steps
            connection.send((losses, time.perf_counter() - start_s))
