"""What a checkpoint holds besides sharded tensors is read in either megatron-core's form."""

import json
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from megatron_ponder.checkpoint.common_state import COMMON_FILE, load_common_state, load_sharded
from tests.ranks import run_ranks

COMMON = {"progress": {"iteration": 3, "data": {"a": [1.5]}}, "weights_only": True}


def weight(value: float) -> ShardedTensor:
    return ShardedTensor.from_rank_offsets("w", torch.full((4,), value))


def save_in_the_newer_form(folder: Path) -> None:
    """As megatron-core 0.19 does, also with 0.16."""
    folder.mkdir()
    dist_checkpointing.save({"w": weight(2.0), **COMMON}, str(folder))
    if (folder / COMMON_FILE).exists():
        assert load_common_state(folder) == COMMON
        among = ShardedObject("common_state", COMMON, (1,), (0,))
        for path in folder.iterdir():
            path.unlink()
        dist_checkpointing.save({"w": weight(2.0), "any": among}, str(folder))
        (folder / COMMON_FILE).unlink()
        described = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        (folder / "metadata.json").write_text(json.dumps(described))


def both_forms(folder: Path) -> None:
    newer = folder / "newer"
    save_in_the_newer_form(newer)
    assert load_common_state(newer) == COMMON
    loaded = load_sharded({"w": weight(0.0)}, newer)
    assert torch.equal(loaded.pop("w"), torch.full((4,), 2.0)) and loaded == COMMON
    neither = folder / "neither"
    neither.mkdir()
    dist_checkpointing.save({"w": weight(1.0)}, str(neither))
    if (neither / COMMON_FILE).exists():
        (neither / COMMON_FILE).unlink()
        with pytest.raises(CheckpointingException, match="neither common.pt nor common_state"):
            load_sharded({"w": weight(0.0)}, neither)


def test_both_forms(tmp_path: Path) -> None:
    run_ranks(both_forms, 1, tmp_path)
