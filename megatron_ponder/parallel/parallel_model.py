"""This rank's part of the model, with its gradient buffers.

A rank usually has one layer chunk, and several if its pipeline rank has virtual stages. Each layer
chunk is wrapped in megatron-core's DDP, which stores its gradients and reduces them over the
data-parallel ranks.

Overlapped reduction of a bucket starts when its gradients are complete. megatron-core detects this
by counting the calls of each parameter's gradient hook and comparing with the first step. The hook
runs once per backward call: once per micro-batch if all passes are one graph, and once per pass if
each pass has its own backward call, as with pipeline chunks or with recomputed passes. In the
second case the count is correct only if every step has as many passes as the first.
"""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from torch import Tensor

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.model.build import build_model_chunks
from megatron_ponder.model.init import name_in_whole_model
from megatron_ponder.model.ponder_gpt_model import PonderGPTModel
from megatron_ponder.ponder.method import Method
from megatron_ponder.ponder.training_plan import check_hook_counts
from megatron_ponder.runtime.distributed import process_groups


@dataclasses.dataclass(frozen=True)
class ParallelModel:
    """The layer chunks on this rank, in model order."""

    chunks: list[DistributedDataParallel]

    @property
    def modules(self) -> list[PonderGPTModel]:
        """The layer chunks without their DDP wrappers."""
        return [chunk.module for chunk in self.chunks]

    @property
    def method(self) -> Method:
        """The training method of the model."""
        return self.modules[0].method

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's parameters under the names they have in the whole model."""
        for module in self.modules:
            for name, parameter in module.named_parameters():
                yield name_in_whole_model(name, module), parameter

    def train(self, mode: bool = True) -> None:
        """Switch between training and evaluation mode: dropout and recomputation on or off."""
        for chunk in self.chunks:
            chunk.train(mode)

    def zero_grad_buffer(self) -> None:
        """Zero the gradient buffers at the start of a step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside the context, gradients are accumulated and not reduced."""
        with ExitStack() as stack:
            for chunk in self.chunks:
                stack.enter_context(chunk.no_sync())
            yield


def build_parallel_model(config: ResolvedConfig) -> ParallelModel:
    """Build this rank's part of a resolved run's model, with initial weights.

    Raises:
        ConfigError: the method is unknown, or the requested overlap would not be exact.
    """
    return wrap_data_parallel(build_model_chunks(config), config)


def wrap_data_parallel(modules: list[PonderGPTModel], config: ResolvedConfig) -> ParallelModel:
    """Wrap each layer chunk in megatron-core's DDP, with gradients stored and reduced in fp32.

    Raises:
        ConfigError: the requested overlap would not be exact.
    """
    parallel = config.parallel
    if parallel.overlap_grad_reduce:
        check_hook_counts(config, modules[0].method)
    return ParallelModel(
        [
            DistributedDataParallel(
                config=module.config,
                ddp_config=DistributedDataParallelConfig(
                    grad_reduce_in_fp32=True,
                    overlap_grad_reduce=parallel.overlap_grad_reduce,
                    overlap_param_gather=parallel.overlap_param_gather,
                    use_distributed_optimizer=parallel.use_distributed_optimizer,
                ),
                module=module,
                # The reduction of later chunks is not on the critical path.
                disable_bucketing=position > 0,
                pg_collection=process_groups(),
            )
            for position, module in enumerate(modules)
        ]
    )
