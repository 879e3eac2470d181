"""Flags of tools/plan.py. Imports no torch: `--help` is instant."""

import dataclasses

from megatron_ponder.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """For which ranks, and what to print."""

    world_size: int
    """Ranks (devices) of the run; they need not exist here."""
    device_memory_gib: float | None = None
    """Memory of a device that a run may fill; the report says whether it fits, and what would.
    Leave about 1 GiB of it to CUDA, its libraries and fragmentation. None: not compared."""
    assumed_tflops: float = 100.0
    """Rate at which a device turns the counted FLOPs into seconds, in TFLOP/s. Changes the seconds
    of the report, not its bubble."""
    timeline: str | None = None
    """PNG to draw one step's timeline into: a row for each pipeline stage."""
    json: bool = False
    """Print one JSON object instead of a report for people."""

    def __post_init__(self) -> None:
        """Refuse what means nothing.

        Raises:
            ConfigError: a number that is too small.
        """
        if self.world_size < 1:
            raise ConfigError(f"--world-size {self.world_size}: must be at least 1.")
        for name in ("device_memory_gib", "assumed_tflops"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"--{name.replace('_', '-')} {value}: must be above 0.")
