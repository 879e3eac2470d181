"""Where a step's time goes: forward, backward, gradients, optimizer.

Measured in steps of their own, with a device synchronisation around every phase; the steps that are
timed as a whole have none. Our phases come from the timers that megatron-core's schedules call and
from the optimizer's update; the reference names its own.

    forward     model and loss, with the copy of the batch to the device
    backward    of all micro-batches
    gradients   from the last backward to the update: reduction over ranks, division by the number
                of tokens, norm; the reference clips here
    optimizer   the update of the weights; ours clips in it
    other       the rest: zeroing gradients, scheduling, Python between the phases
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.processes import Held
from benchmarks.timing import synchronize_device
from megatron_ponder.files import published
from megatron_ponder.train.step import TrainingState

MCORE_PHASES = {"forward-compute": "forward", "backward-compute": "backward"}
"""By the names of megatron-core's timers."""
NAMES = ("forward", "backward", "gradients", "optimizer", "other")


class Phase(Protocol):
    """What a step calls to name a part of itself."""

    def __call__(self, name: str) -> contextlib.AbstractContextManager[None]:
        """A range of that name."""


def unnamed(name: str) -> contextlib.AbstractContextManager[None]:
    """A range that costs nothing."""
    return contextlib.nullcontext()


@dataclasses.dataclass
class PhaseTimes:
    """Spans of one step by name, in the host's clock and in a profiler's trace."""

    synchronizes: bool = True
    """Whether both ends of a range synchronise with the device."""
    spans: list[tuple[str, float, float]] = dataclasses.field(default_factory=list)
    """Name, begin and end in seconds."""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        with torch.profiler.record_function(name):
            begin_s = self._now_s()
            yield
            self.spans.append((name, begin_s, self._now_s()))

    def _now_s(self) -> float:
        if self.synchronizes:
            synchronize_device()
        return time.perf_counter()

    def in_ms(self, step_s: float) -> dict[str, float]:
        """Milliseconds by phase of a step that took `step_s`; they add up to it."""
        ms = dict.fromkeys(NAMES, 0.0)
        for name, begin_s, end_s in self.spans:
            ms[name] += 1e3 * (end_s - begin_s)
        if not ms["gradients"]:
            last_backward_s = max(end_s for name, _, end_s in self.spans if name == "backward")
            update_s = min(begin_s for name, begin_s, _ in self.spans if name == "optimizer")
            ms["gradients"] = 1e3 * (update_s - last_backward_s)
        ms["other"] = 1e3 * step_s - sum(ms.values())
        return ms


def time_phases(held: Held, name: str, num_steps: int) -> dict[str, float]:
    """In a process: milliseconds by phase, and `total`, of the fastest of a few steps."""
    steps = []
    for iteration in range(1, num_steps + 1):
        synchronize_device()
        times, begin_s = PhaseTimes(), time.perf_counter()
        held[name].step(iteration, times)
        synchronize_device()
        step_s = time.perf_counter() - begin_s
        steps.append(times.in_ms(step_s) | {"total": 1e3 * step_s})
    return min(steps, key=lambda ms: ms["total"])


@contextlib.contextmanager
def named_phases(training_state: TrainingState, phase: Phase) -> Iterator[None]:
    """Inside, our training step names its phases.

    Args:
        training_state: on one pipeline stage.
        phase: names them; with `unnamed` nothing is patched.
    """
    if phase is unnamed:
        yield
        return
    config, optimizer = training_state.model.modules[0].config, training_state.optimizer
    update = optimizer.step_with_ready_grads

    def named_update() -> Any:
        with phase("optimizer"):
            return update()

    timers, config.timers = config.timers, _McoreTimers(phase)
    optimizer.step_with_ready_grads = named_update
    try:
        yield
    finally:
        config.timers = timers
        del optimizer.step_with_ready_grads


class _McoreTimers:
    """What megatron-core's config takes as `timers`."""

    def __init__(self, phase: Phase) -> None:
        self._phase = phase

    def __call__(self, name: str, log_level: int | None = None) -> "_McoreTimer":
        """The timer of that name."""
        return _McoreTimer(self._phase, MCORE_PHASES.get(name))


class _McoreTimer:
    """One timer. Those of a kind do not overlap; those of no phase do nothing."""

    _open: contextlib.ExitStack | None = None

    def __init__(self, phase: Phase, name: str | None) -> None:
        self._phase, self._name = phase, name

    def start(self, barrier: bool = False) -> None:
        """Begin the phase."""
        if self._name is not None:
            _McoreTimer._open = contextlib.ExitStack()
            _McoreTimer._open.enter_context(self._phase(self._name))

    def stop(self, barrier: bool = False) -> None:
        """End it."""
        if self._name is not None and _McoreTimer._open is not None:
            _McoreTimer._open.close()


def trace_step(held: Held, name: str, path: str) -> None:
    """In a process: write a profiler's trace of one step, in Chrome's format.

    Args:
        held: what the process holds.
        name: of the side.
        path: of the JSON file; with the suffix .gz it is compressed.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        held[name].step(1, PhaseTimes(synchronizes=False))
        synchronize_device()
    with published(Path(path)) as unfinished:
        profiler.export_chrome_trace(str(unfinished))
