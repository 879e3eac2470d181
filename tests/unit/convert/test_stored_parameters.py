"""Single parameters of a checkpoint: read whole, and missed before anything is read."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.checkpoint as dcp

from megatron_ponder.convert.stored_parameters import ParameterReader, Piece
from megatron_ponder.errors import CheckpointError

WEIGHT = torch.arange(24.0).view(4, 6)


def reader(folder: Path, *pieces: Piece) -> ParameterReader:
    parameters = SimpleNamespace(pieces={"weight": pieces}, shapes={"weight": (4, 6)})
    return ParameterReader(folder, parameters)


def piece(key: str, stored_shape: tuple[int, ...] = (4, 6)) -> Piece:
    return Piece(key=key, offset=(0, 0), shape=(4, 6), num_stacked=0, stored_shape=stored_shape)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    dcp.save({"stored": WEIGHT}, checkpoint_id=tmp_path, no_dist=True)
    return tmp_path


def test_what_a_checkpoint_lacks_is_told_at_once(checkpoint: Path) -> None:
    """Not when its turn comes: other parameters may have been written by then."""
    assert torch.equal(reader(checkpoint, piece("stored")).read("weight"), WEIGHT)
    with pytest.raises(CheckpointError, match="has no other"):
        reader(checkpoint, piece("other"))
    with pytest.raises(CheckpointError, match=r"stored has shape \(4, 6\), .* have \(4, 8\)"):
        reader(checkpoint, piece("stored", stored_shape=(4, 8)))
