"""Stops a run before its last iteration, after a signal or a time limit.

A signal or the time limit only raises a flag on the rank that notices it. The flags of all ranks
are summed in each iteration, so every rank stops after the same iteration. `train.loop` handles
--exit-interval.
"""

import signal
import time
from types import FrameType
from typing import Any

from megatron_ponder.config.resolved import ResolvedTrainingConfig
from megatron_ponder.runtime.distributed import is_rank_zero

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """This rank's stop request. A context manager, which catches signals while it is active."""

    def __init__(self, config: ResolvedTrainingConfig, start_s: float) -> None:
        """Compute the deadline; `__enter__` installs the signal handlers.

        Args:
            config: gives the time limit in minutes.
            start_s: `time.monotonic()` at the start of the run.
        """
        self._signal: int | None = None
        minutes = config.exit_duration_in_mins
        self._deadline_s = None if minutes is None else start_s + 60 * minutes
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        """Install the signal handlers."""
        self._previous = {number: signal.signal(number, self._notice) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def is_raised(self) -> bool:
        """Whether this rank requests a stop; only rank 0 checks the time limit."""
        return self._signal is not None or self._is_late()

    def reason(self) -> str:
        """The reason for the stop, as far as this rank knows."""
        if self._signal is not None:
            return f"signal {signal.Signals(self._signal).name}"
        return "--exit-duration-in-mins" if self._is_late() else "a signal on another rank"

    def _is_late(self) -> bool:
        """Whether the time limit has passed, by rank 0's clock."""
        if self._deadline_s is None or not is_rank_zero():
            return False
        return time.monotonic() >= self._deadline_s

    def _notice(self, number: int, frame: FrameType | None) -> None:
        """Record a signal. A second one, which torchrun may send, has no further effect."""
        self._signal = number
