"""When a run ends before its last iteration: a signal, the clock, or --exit-interval.

A signal or the clock only raises a flag on the rank that noticed; the flags of all ranks are summed
inside the iteration, so that every rank stops after the same one.
"""

import signal
import time
from types import FrameType
from typing import Any

from megatron_ponder.config.resolved import ResolvedTrainingConfig
from megatron_ponder.runtime.distributed import is_rank_zero

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether this rank wants to stop. A context: signals are caught inside it."""

    def __init__(self, config: ResolvedTrainingConfig, start_s: float) -> None:
        """Prepare.

        Args:
            config: says after how many minutes to stop.
            start_s: `time.monotonic()` when the run began.
        """
        self._signal: int | None = None
        minutes = config.exit_duration_in_mins
        self._deadline_s = None if minutes is None else start_s + 60 * minutes
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        """Catch signals from here on."""
        self._previous = {number: signal.signal(number, self._notice) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        """Hand signals back to whoever had them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def is_raised(self) -> bool:
        """Whether this rank asks to stop; only rank 0 looks at the clock."""
        return self._signal is not None or self._is_late()

    def reason(self) -> str:
        """Why the run stops, as far as this rank knows."""
        if self._signal is not None:
            return f"signal {signal.Signals(self._signal).name}"
        return "--exit-duration-in-mins" if self._is_late() else "a signal on another rank"

    def _is_late(self) -> bool:
        """Whether the time is up, by rank 0's clock."""
        if self._deadline_s is None or not is_rank_zero():
            return False
        return time.monotonic() >= self._deadline_s

    def _notice(self, number: int, frame: FrameType | None) -> None:
        """Remember a signal; a second one, which torchrun may send, changes nothing."""
        self._signal = number
