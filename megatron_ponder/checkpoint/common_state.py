"""The part of a checkpoint that is not sharded, as either megatron-core stores it.

megatron-core 0.16 keeps it in common.pt; 0.19 makes it one more object among the shards, and reads
both forms. Here 0.16 learns to.
"""

import inspect
import io
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict

COMMON_FILE = "common.pt"
_KEY = ShardedObject("common_state", None, (1,), (0,)).unique_key


def load_common_state(checkpoint: Path) -> dict[str, Any]:
    """The part that is not sharded.

    Raises:
        CheckpointingException: neither form is there.
    """
    if (checkpoint / COMMON_FILE).is_file():
        state: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(checkpoint))
        return state
    reader = dcp.FileSystemReader(str(checkpoint))
    if _KEY not in reader.read_metadata().state_dict_metadata:
        raise CheckpointingException(f"there is neither {COMMON_FILE} nor {_KEY}")
    found: dict[str, Any] = {_KEY: io.BytesIO()}
    dcp.load(found, storage_reader=reader, no_dist=True)
    stored = found[_KEY]
    if isinstance(stored, io.BytesIO):
        stored.seek(0)
        stored = torch.load(stored, weights_only=True)
    (state,) = stored
    return state


def load_sharded(request: ShardedStateDict, checkpoint: Path) -> dict[str, Any]:
    """Fill a request, and add the part that is not sharded.

    Raises:
        CheckpointingException: the checkpoint does not hold what is asked for.
    """
    more = {}
    takes_strategy = "common_strategy" in inspect.signature(dist_checkpointing.load).parameters
    if takes_strategy and not (checkpoint / COMMON_FILE).is_file():
        more = {"common_strategy": _AmongShards()}
    state: dict[str, Any] = dist_checkpointing.load(request, str(checkpoint), **more)
    return state


class _AmongShards:
    """What 0.16 calls to load the part that is not sharded."""

    def load_common(self, checkpoint_dir: str | Path) -> dict[str, Any]:
        """See LoadCommonStrategy of megatron-core 0.16."""
        return load_common_state(Path(checkpoint_dir))

    def check_backend_compatibility(self, loaded_version: object) -> None:
        """Any: the object is found by its name."""

    def check_version_compatibility(self, loaded_version: object) -> None:
        """Any."""
