"""Log lines and progress bars of a job of many processes. Imports no torch.

Modules log through the standard `logging` under their own name. `configure`, called once by an
entry point, makes rank 0 print everything from INFO on, and the other ranks only errors, marked
with their rank. What is left out: files and services (train/metrics.py) and error messages for the
user (errors.py).
"""

import logging
import os
import sys
import warnings
from typing import Any, TextIO

from tqdm import tqdm

PACKAGE_LOGGER = "megatron_ponder"
PROGRESS_INTERVAL_S = 5.0
"""How often a progress bar is printed where the output is not a terminal."""


def configure(stream: TextIO | None = None) -> None:
    """Send this package's log to a stream; harmless when called again.

    Also silences two kinds of warnings that are no business of a user: megatron-core's about absent
    accelerator libraries, and torch's about calls that megatron-core makes. To have any effect it
    has to be called before those libraries are imported.
    """
    rank = _rank()
    logger = logging.getLogger(PACKAGE_LOGGER)
    logger.setLevel(logging.INFO if rank == 0 else logging.ERROR)
    logger.propagate = False
    handler = logging.StreamHandler(stream or sys.stdout)
    mark = "" if rank == 0 else f"[rank {rank}] "
    handler.setFormatter(
        logging.Formatter(f"[%(asctime)s] {mark}%(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    )
    logger.handlers = [handler]
    logging.getLogger("megatron.core").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"megatron\.core\..*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\..*")
    warnings.filterwarnings("ignore", module=r"torch\.distributed\.checkpoint\..*")


def progress(
    total: int | None, description: str, unit: str, initial: int = 0, unit_scale: bool = False
) -> "tqdm[Any]":
    """A progress bar with rate and remaining time on rank 0; silent on the others.

    Args:
        total: units in the whole task; None: nobody knows.
        description: what is going on.
        unit: name of one unit.
        initial: units done before.
        unit_scale: write large numbers with k, M, G.
    """
    interval_s = 0.1 if sys.stderr.isatty() else PROGRESS_INTERVAL_S
    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        unit_scale=unit_scale,
        mininterval=interval_s,
        disable=_rank() != 0,
    )


def _rank() -> int:
    """Global rank of this process as torchrun sets it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))
