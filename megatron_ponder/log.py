"""Log lines and progress bars of a multi-process job. Does not import torch.

Modules log through the standard `logging` under their own name. An entry point calls `configure`
once. Rank 0 then prints everything from INFO on; the other ranks print errors only, marked with
their rank. train/sinks.py writes metrics to files and services. errors.py has the error messages
for the user.
"""

import logging
import os
import sys
import warnings
from typing import Any, TextIO

from tqdm import tqdm

PACKAGE_LOGGER = "megatron_ponder"
PROGRESS_INTERVAL_S = 5.0
"""Interval between updates of a progress bar if the output is not a terminal."""


def configure(stream: TextIO | None = None) -> None:
    """Send this package's log to a stream. Repeated calls are harmless.

    This also silences two kinds of warnings that do not concern the user: megatron-core's about
    missing accelerator libraries, and torch's about calls that megatron-core makes. For that, call
    it before those libraries are imported.
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
    """A progress bar with rate and remaining time on rank 0; silent on the other ranks.

    Args:
        total: units in the whole task; None: unknown.
        description: label of the bar.
        unit: name of one unit.
        initial: units that are already done.
        unit_scale: abbreviate large numbers with k, M, G.
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
    """Global rank of this process, as set by torchrun; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))
