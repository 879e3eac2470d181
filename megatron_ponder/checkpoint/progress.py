"""How far a run has come: what a checkpoint stores besides weights, optimizer and random states."""

import dataclasses
from typing import Any


@dataclasses.dataclass(kw_only=True)
class Progress:
    """Counters of a run. Plain numbers, equal on all ranks, changed in place by the loop."""

    iteration: int = 0
    """Iterations that are done."""
    consumed_samples: int = 0
    """Training sequences read so far: the position in the data."""
    consumed_tokens: int = 0
    """Tokens in those sequences that took part in the loss."""
    skipped_iterations: int = 0
    """Iterations whose update was left out because loss or gradient was not finite."""
    log_window: dict[str, float] = dataclasses.field(default_factory=dict)
    """Sums over the iterations since the last log line, so that the first line after a resume
    averages over what it would have without the stop."""

    data: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fingerprint of the training data that `consumed_samples` counts in. Empty: not known."""

    @property
    def updates(self) -> int:
        """Optimizer steps that were made."""
        return self.iteration - self.skipped_iterations

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as stored."""
        return dataclasses.asdict(self)
