"""What a checkpoint holds, in megatron-core's terms: sharded tensors and sharded objects."""

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.distributed import DistributedDataParallel

from megatron_ponder.checkpoint.optimizer_state import METADATA
from megatron_ponder.model.ponder_gpt_model import PonderGPTModel
from megatron_ponder.runtime.distributed import Ranks

RANDOM_STATE_KEY = "rng_state"
WEIGHTS_ONLY = "weights_only"
"""True in a checkpoint that was imported: the state before the first iteration."""


def model_state(chunks: list[PonderGPTModel]) -> ShardedStateDict:
    """The parameters of this rank's chunks of layers, each with its place in the whole model.

    All of them together: megatron-core refuses to read a part of the layers.
    """
    return {
        str(position): chunk.sharded_state_dict(metadata=METADATA)
        for position, chunk in enumerate(chunks)
    }


def complete_parameters(chunks: list[DistributedDataParallel]) -> None:
    """Gather the updated weights where that is left to the next forward."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def load_chunks(chunks: list[PonderGPTModel], loaded: dict[str, Any]) -> None:
    """Put what a request of `model_state` brought into the chunks."""
    for position, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[str(position)])


def random_state_object(ranks: Ranks, data: dict[str, Any] | None) -> ShardedObject:
    """One rank's random states among those of all ranks; `data` None asks for them."""
    return ShardedObject(
        RANDOM_STATE_KEY,
        data,
        global_shape=tuple(parallel_sizes(ranks).values()),
        global_offset=(
            ranks.tensor_parallel_rank,
            ranks.pipeline_parallel_rank,
            ranks.context_parallel_rank,
            ranks.data_parallel_rank,
        ),
        replica_id=0,
    )


def parallel_sizes(ranks: Ranks) -> dict[str, int]:
    """The shape of the layout: what random states depend on."""
    return {
        "tensor_parallel_size": ranks.tensor_parallel_size,
        "pipeline_parallel_size": ranks.pipeline_parallel_size,
        "context_parallel_size": ranks.context_parallel_size,
        "data_parallel_size": ranks.data_parallel_size,
    }
