"""Flags of `tools/benchmark.py curves`. Imports no torch: `--help` is instant."""

import dataclasses
from typing import Literal, get_args

from megatron_ponder.errors import ConfigError

Variable = Literal[
    "thoughts",
    "jacobi-iterations",
    "seq-length",
    "width",
    "depth",
    "micro-batch",
    "method",
    "recomputation",
    "data-parallel",
    "pipeline",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class CurvesBenchmarkOptions:
    """Which curves, through which points, measured how often."""

    variables: tuple[Variable, ...] = get_args(Variable)
    """What is varied, one after the other, everything else as in the base."""
    k_values: tuple[int, ...] = (0, 1, 2, 3)
    """thoughts: each K."""
    r_values: tuple[int, ...] = (0, 1, 2, 3, 4)
    """jacobi-iterations: each R."""
    factors: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """seq-length, width, depth, micro-batch: multiples of the base's. The batch of a step grows
    with the micro-batch; heads keep their width."""
    ranks: tuple[int, ...] = (1, 2)
    """data-parallel, pipeline: numbers of ranks, each with a core (one thread) or a GPU of its own.
    The batch of a step stays as it is."""
    rounds: int = 5
    """Rounds in which base and point take turns."""
    steps: int = 1
    """Optimizer steps of each in a round."""
    warmup_steps: int = 1
    """Steps of each before the first round, not timed."""
    json: bool = False
    """Print one JSON object instead of tables."""
    record: str | None = None
    """File to write that JSON object into."""
    plot: str | None = None
    """PNG to draw into, a panel for each variable."""

    def __post_init__(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            ConfigError: a number too small, or nothing to measure.
        """
        for name in ("rounds", "steps", "warmup_steps"):
            if getattr(self, name) < 1:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} {getattr(self, name)}: must be at least 1.")
        if not self.variables:
            raise ConfigError("--variables: give at least one.")
        if min((*self.k_values, *self.r_values), default=0) < 0:
            raise ConfigError("--k-values and --r-values: every number must be at least 0.")
        if min(self.factors, default=1) <= 0 or min(self.ranks, default=1) < 1:
            raise ConfigError("--factors must be above 0, --ranks at least 1.")
