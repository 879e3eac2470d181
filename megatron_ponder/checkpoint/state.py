"""What a checkpoint holds, in megatron-core's terms: sharded tensors and sharded objects."""

from typing import Any

from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedStateDict
from megatron.core.distributed import DistributedDataParallel

from megatron_ponder.checkpoint.optimizer_state import METADATA
from megatron_ponder.runtime.distributed import Ranks

RANDOM_STATE_KEY = "rng_state"


def model_state(model: DistributedDataParallel) -> ShardedStateDict:
    """The model's parameters themselves, each with its place in the whole."""
    return model.module.sharded_state_dict(metadata=METADATA)


def random_state_object(ranks: Ranks, data: dict[str, Any] | None) -> ShardedObject:
    """One rank's random states among those of all ranks; `data` None asks for them."""
    return ShardedObject(
        RANDOM_STATE_KEY,
        data,
        global_shape=(ranks.tensor_parallel_size, ranks.data_parallel_size),
        global_offset=(ranks.tensor_parallel_rank, ranks.data_parallel_rank),
        replica_id=0,
    )


def layout(ranks: Ranks) -> dict[str, int]:
    """The shape of the layout: what random states depend on."""
    return {
        "tensor_parallel_size": ranks.tensor_parallel_size,
        "data_parallel_size": ranks.data_parallel_size,
    }
