"""Saving a checkpoint, on all ranks together."""

import logging
import queue
import shutil
import time
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ponder.checkpoint import storage
from megatron_ponder.checkpoint.optimizer_state import METADATA
from megatron_ponder.checkpoint.progress import Progress
from megatron_ponder.checkpoint.rng import random_state
from megatron_ponder.checkpoint.state import (
    complete_parameters,
    model_state,
    parallel_sizes,
    random_state_object,
)
from megatron_ponder.checkpoint.stored_config import write_configs
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.errors import CheckpointError
from megatron_ponder.runtime.distributed import data_parallel_group, is_rank_zero, ranks

logger = logging.getLogger(__name__)

FILES_PER_RANK = 1


def prepare_folder(config: ResolvedConfig) -> None:
    """Create `--save`, and refuse to mix this run's checkpoints with another's.

    Raises:
        CheckpointError: the folder cannot be written, or holds checkpoints that this run would
            overwrite without having gone on from them.
    """
    save, load = config.checkpoint.save, config.checkpoint.load
    if save is None:
        return
    folder = Path(save)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"--save {save}: cannot create the folder: {error}.") from None
    stored = storage.stored_iterations(folder)
    goes_on = load is not None and Path(load).resolve() == folder.resolve()
    if stored and not goes_on:
        raise CheckpointError(
            f"--save {save} holds a checkpoint of iteration {stored[-1]} of another run. To go on "
            f"from it add --load {save} (without --finetune); else choose an empty folder."
        )


def save_checkpoint(
    config: ResolvedConfig,
    *,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    progress: Progress,
) -> Path:
    """Write everything that is needed to go on as if there had been no stop.

    Every rank calls it, between two iterations. Data-parallel ranks share the writing.

    Returns:
        The folder of the checkpoint.
    """
    assert config.checkpoint.save is not None
    start_s = time.monotonic()
    folder = Path(config.checkpoint.save)
    unfinished = storage.unfinished_folder(folder, progress.iteration)
    if is_rank_zero():
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    # megatron-core (0.16.1 to 0.19.x) passes what its writers did through a queue in a process that
    # it spawns for the purpose, 5 s once per rank. They report to this process: a plain queue does.
    filesystem_async._results_queue = queue.Queue()
    here = ranks()
    complete_parameters(chunks)
    weights = model_state([chunk.module for chunk in chunks])
    dist_checkpointing.save(
        {
            "model": weights,
            "optimizer": optimizer.sharded_state_dict(weights, metadata=METADATA),
            "opt_param_scheduler": scheduler.state_dict(),
            "rng_state": random_state_object(here, random_state()),
            "progress": progress.to_dict(),
            "layout": parallel_sizes(here),
        },
        str(unfinished),
        FullyParallelSaveStrategyWrapper(
            TorchDistSaveShardedStrategy("torch_dist", 1, thread_count=FILES_PER_RANK),
            data_parallel_group(),
        ),
    )
    if is_rank_zero():
        write_configs(unfinished, config)
        storage.publish(folder, progress.iteration)
        storage.prune(folder, progress.iteration, config.checkpoint.keep_checkpoints)
    dist.barrier()
    checkpoint = storage.iteration_folder(folder, progress.iteration)
    logger.info("saved checkpoint %s (%.1f s)", checkpoint, time.monotonic() - start_s)
    return checkpoint
