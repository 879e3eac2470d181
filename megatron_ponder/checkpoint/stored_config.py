"""The two configs in a checkpoint: the settings as given, and what they came to.

run_config.yaml holds the settings as given, with null for every value that was left to be derived.
Used as --config of another run it leaves those values open: with a longer --train-iters the LR
decay ends later. resolved_config.yaml holds the same settings with all derived values; evaluation,
generation, export and the comparison on resume read this one.

Defaults and presets are stored as values, not left out or named, so that a later version that
changes them does not change the stored run. Checkpoints of earlier versions have only
run_config.yaml, with the resolved values. Imports no torch.
"""

import dataclasses
from pathlib import Path

from megatron_ponder.checkpoint import storage
from megatron_ponder.config.parse import config_from_flat_dict, dump_yaml, read_yaml
from megatron_ponder.config.resolve import restore
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import CheckpointError, ConfigError
from megatron_ponder.files import write_text


def write_configs(folder: Path, config: ResolvedConfig) -> None:
    """Write both files into the folder of an unfinished checkpoint."""
    write_text(folder / storage.CONFIG_FILE, dump_yaml(config.given))
    write_text(folder / storage.RESOLVED_CONFIG_FILE, dump_yaml(config))


def read_config(checkpoint: Path) -> ResolvedConfig:
    """The config of the run that wrote a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or a version of this package with other settings wrote
            it.
    """
    given = _read(checkpoint / storage.CONFIG_FILE)
    path = checkpoint / storage.RESOLVED_CONFIG_FILE
    stored = _read(path) if path.is_file() else given
    try:
        return dataclasses.replace(restore(stored), given=given)
    except ConfigError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from None


def _read(path: Path) -> RunConfig:
    """The settings in one file."""
    try:
        settings = read_yaml(path, str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    try:
        return config_from_flat_dict(settings)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from None
