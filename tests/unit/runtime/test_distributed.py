"""Coordinates and groups of ranks, in a layout that has every axis."""

import dataclasses

import torch.distributed as dist

from megatron_ponder.config.schema import ParallelConfig
from megatron_ponder.runtime import distributed
from tests.ranks import run_ranks

SIZES = {"tensor": 2, "context": 2, "data": 1, "pipeline": 2}


def describe() -> tuple[dict[str, int], bool, dict[str, list[int]]]:
    """In a rank: its coordinates, whether it computes the loss, and its groups."""
    config = ParallelConfig(
        tensor_model_parallel_size=2, context_parallel_size=2, pipeline_model_parallel_size=2
    )
    with distributed.running(config, seed=1):
        groups = {
            "tensor": distributed.tensor_parallel_group(),
            "context": distributed.context_parallel_group(),
            "data": distributed.data_parallel_group(),
            "pipeline": distributed.backward_pipeline_group(),
        }
        members = {name: dist.get_process_group_ranks(group) for name, group in groups.items()}
        here = distributed.ranks()
        return dataclasses.asdict(here), here.is_last_stage, members


def test_eight_ranks() -> None:
    """Neighbours are tensor-parallel, then context-parallel; stages are furthest apart."""
    for rank, (here, is_last_stage, members) in enumerate(run_ranks(describe, 8)):
        pipeline, rest = divmod(rank, 4)
        context, tensor = divmod(rest, 2)
        coordinates = {"tensor": tensor, "context": context, "data": 0, "pipeline": pipeline}
        assert here == {
            "rank": rank,
            "world_size": 8,
            **{f"{axis}_parallel_rank": value for axis, value in coordinates.items()},
            **{f"{axis}_parallel_size": size for axis, size in SIZES.items()},
        }
        assert is_last_stage == (pipeline == 1)
        shares_weights = [4 * pipeline + tensor, 4 * pipeline + tensor + 2]
        assert members == {
            "tensor": [rank - tensor, rank - tensor + 1],
            "context": shares_weights,
            "data": shares_weights,  # context-parallel ranks hold the same weights
            "pipeline": [rest, rest + 4],
        }
