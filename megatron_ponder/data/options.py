"""Flags of tools/prepare_index.py. Imports no torch: `--help` is instant."""

import dataclasses

from megatron_ponder.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareIndexOptions:
    """The flags that the run itself does not have."""

    world_size: int = 1
    """Number of ranks of the run (nodes x processes per node)."""

    def __post_init__(self) -> None:
        """Refuse fewer than one rank.

        Raises:
            ConfigError: world_size is less than one.
        """
        if self.world_size < 1:
            raise ConfigError(f"--world-size {self.world_size}: must be at least 1.")
