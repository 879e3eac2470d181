"""Where a step's time goes: forward, backward, gradients, optimizer.

Timed in steps of their own, in which the host waits for the device around every phase; the steps
that make the speed are not touched. Ours is told apart by the timers that megatron-core's schedules
offer and by the optimizer's methods, a plain step by the ranges that it names itself.

    forward     model and loss, with the batch's way to the device
    backward    of all micro-batches
    gradients   what lies between the last backward and the update: reduction over ranks, division
                by the number of tokens, norm; a plain step clips here
    optimizer   the update of the weights; ours clips in it
    other       the rest: setting gradients to zero, scheduling, Python between the phases
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

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


def synchronize_device() -> None:
    """Until everything that was started on the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@dataclasses.dataclass
class PhaseTimes:
    """Spans of one step by name, as the host's clock and a profiler see them."""

    waits: bool = True
    """Whether the host waits for the device at both ends of a range."""
    spans: list[tuple[str, float, float]] = dataclasses.field(default_factory=list)
    """Name, begin and end in seconds."""

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time what is inside."""
        with torch.profiler.record_function(name):
            self._wait()
            begin_s = time.perf_counter()
            yield
            self._wait()
            self.spans.append((name, begin_s, time.perf_counter()))

    def _wait(self) -> None:
        if self.waits:
            synchronize_device()

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


def time_phases(step: Callable[[Phase], Any]) -> dict[str, float]:
    """Milliseconds by phase, and `total`, of one step."""
    synchronize_device()
    times, begin_s = PhaseTimes(), time.perf_counter()
    step(times)
    synchronize_device()
    step_s = time.perf_counter() - begin_s
    return times.in_ms(step_s) | {"total": 1e3 * step_s}


@contextlib.contextmanager
def named_phases(training_state: TrainingState, phase: Phase) -> Iterator[None]:
    """Inside, our training step names its phases.

    Args:
        training_state: on one pipeline stage.
        phase: what to name them with; `unnamed`: nothing is done.
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
    """One of them; those of a kind do not overlap. Timers of no phase do nothing."""

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


def trace_step(step: Callable[[Phase], Any], path: str) -> None:
    """Write one step as the profiler saw it, in Chrome's trace format.

    Args:
        step: takes a step whose phases it names; nothing waits for the device in between.
        path: of the JSON file (with .gz, compressed).
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        step(PhaseTimes(waits=False))
        synchronize_device()
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    # The suffix decides about compression.
    unfinished = target.with_name(f".{target.name}")
    profiler.export_chrome_trace(str(unfinished))
    unfinished.replace(target)
