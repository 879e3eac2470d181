"""Flags of tools/prepare_index.py. Imports no torch: `--help` is instant."""

import dataclasses

from megatron_ponder.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrepareIndexOptions:
    """What the flags of the run do not say."""

    world_size: int = 1
    """Ranks that the run will have (nodes x processes per node)."""

    def __post_init__(self) -> None:
        """Refuse what is no number of ranks.

        Raises:
            ConfigError: less than one.
        """
        if self.world_size < 1:
            raise ConfigError(f"--world-size {self.world_size}: must be at least 1.")
