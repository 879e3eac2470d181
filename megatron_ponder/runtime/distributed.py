"""Process groups and ranks. Only this module initialises megatron-core's `parallel_state`.

Works under torchrun, and as a single process without it. The rest of the code calls the functions
here; only `parallel/` also uses `parallel_state` directly.
"""

import dataclasses
import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_ponder.config.schema import ParallelConfig
from megatron_ponder.errors import BackendError
from megatron_ponder.runtime import mcore_cpu
from megatron_ponder.runtime.device import device

_layout: tuple[int, int, int] | None = None
"""TP, PP and CP sizes that megatron-core's groups were created for."""
_backward_pipeline_group: dist.ProcessGroup | None = None


def world_size_from_environment() -> int:
    """Number of ranks that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_rank_zero() -> bool:
    """Whether this is rank 0, which reports for all. Works before torch.distributed is started."""
    return int(os.environ.get("RANK", "0")) == 0


def initialize(config: ParallelConfig, seed: int) -> None:
    """Start torch.distributed and megatron-core's groups, and seed the random generators.

    Groups of the same layout are kept: a new set would add some thirty, each with a thread.

    Args:
        config: resolved layout; TP x PP x CP must divide the number of ranks.
        seed: seed of dropout. Tensor-parallel ranks get different random streams where masks must
            differ, and the same stream where masks must agree.

    Raises:
        BackendError: nccl without CUDA, or no device for this rank.
    """
    mcore_cpu.apply()
    backend = _choose_backend(config.distributed_backend)
    # Set the current device before anything is allocated: megatron-core, Triton and the process
    # groups use it. We do not pass `device_id` to init_process_group, because then every rank would
    # have to take part in creating every group, including groups that it is not in.
    if device().type == "cuda":
        torch.cuda.set_device(device())
    timeout = datetime.timedelta(minutes=config.distributed_timeout_minutes)
    if not dist.is_initialized():
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timeout)
        else:
            store = dist.HashStore()
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
    _enter_layout(config, timeout)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, te_rng_tracker=False)


def _enter_layout(config: ParallelConfig, timeout: datetime.timedelta) -> None:
    """Create megatron-core's groups and ours, unless those of this layout are there."""
    global _layout
    sizes = (
        config.tensor_model_parallel_size,
        config.pipeline_model_parallel_size,
        config.context_parallel_size,
    )
    if sizes == _layout:
        return
    leave_layout()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=sizes[0],
        pipeline_model_parallel_size=sizes[1],
        context_parallel_size=sizes[2],
        distributed_timeout_minutes=config.distributed_timeout_minutes,
    )
    _start_backward_pipeline_group(timeout)
    _layout = sizes


def leave_layout() -> None:
    """Forget megatron-core's groups, so that another layout can be entered."""
    global _layout, _backward_pipeline_group
    _layout = _backward_pipeline_group = None
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()


def _start_backward_pipeline_group(timeout: datetime.timedelta) -> None:
    """Create a second group over the ranks of each pipeline, for gradients.

    With two stages, the previous and the next rank are the same. Its activations and gradients
    would share one stream of messages, which nccl and gloo match by order alone.
    """
    global _backward_pipeline_group
    forward = parallel_state.get_pipeline_model_parallel_group()
    if forward.size() == 1:
        return
    mine = dist.get_process_group_ranks(forward)
    of_ranks: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(of_ranks, mine)
    for pipeline in sorted(set(map(tuple, of_ranks))):
        group = dist.new_group(list(pipeline), timeout=timeout)
        if list(pipeline) == mine:
            _backward_pipeline_group = group
    # The first nccl operation of a group connects all of its ranks, so all must take part in it.
    # Later operations involve only some of them.
    for group in (forward, _backward_pipeline_group):
        dist.barrier(group=group)


def shutdown() -> None:
    """Destroy all process groups, if any were started."""
    leave_layout()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def running(config: ParallelConfig, seed: int) -> Iterator[None]:
    """Call `initialize` on entry and `shutdown` on exit."""
    initialize(config, seed)
    try:
        yield
    finally:
        shutdown()


def process_groups() -> ProcessGroupCollection:
    """The process groups, in the form that megatron-core's modules take."""
    return ProcessGroupCollection.use_mpu_process_groups()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranks:
    """The coordinates of this process in the layout."""

    rank: int
    world_size: int
    tensor_parallel_rank: int
    tensor_parallel_size: int
    pipeline_parallel_rank: int
    pipeline_parallel_size: int
    context_parallel_rank: int
    context_parallel_size: int
    data_parallel_rank: int
    data_parallel_size: int

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank computes the loss."""
        return self.pipeline_parallel_rank == self.pipeline_parallel_size - 1


def ranks() -> Ranks:
    """The coordinates of this process. Call `initialize` first."""
    return Ranks(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tensor_parallel_rank=parallel_state.get_tensor_model_parallel_rank(),
        tensor_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_parallel_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pipeline_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        context_parallel_rank=parallel_state.get_context_parallel_rank(),
        context_parallel_size=parallel_state.get_context_parallel_world_size(),
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )


def tensor_parallel_group() -> dist.ProcessGroup:
    """Ranks that share each layer's weights."""
    group: dist.ProcessGroup = parallel_state.get_tensor_model_parallel_group()
    return group


def context_parallel_group() -> dist.ProcessGroup:
    """Ranks that share each sequence."""
    group: dist.ProcessGroup = parallel_state.get_context_parallel_group()
    return group


def backward_pipeline_group() -> dist.ProcessGroup:
    """The ranks of this rank's pipeline, in a second group that only gradients use."""
    assert _backward_pipeline_group is not None, "there is one pipeline stage only"
    return _backward_pipeline_group


def data_parallel_group() -> dist.ProcessGroup:
    """Ranks that hold the same weights and different samples (context-parallel ranks included)."""
    group: dist.ProcessGroup = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return group


def _choose_backend(wanted: str) -> str:
    """Resolve 'auto', and refuse nccl without CUDA."""
    if wanted == "auto":
        return "nccl" if torch.cuda.is_available() else "gloo"
    if wanted == "nccl" and not torch.cuda.is_available():
        raise BackendError(
            "--distributed-backend nccl needs CUDA, which this machine does not have. "
            "Use auto or gloo."
        )
    return wanted
