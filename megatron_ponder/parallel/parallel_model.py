"""This rank's part of the model, with its gradient buffers.

Usually one chunk of layers; several where a pipeline rank has virtual stages. megatron-core's DDP
keeps each chunk's gradients and reduces them over the data-parallel ranks.

Overlapped reduction starts when the gradients of a bucket are complete, which megatron-core tells
by counting calls of each parameter's gradient hook and comparing with the first step. The hook is
called once per backward call: once per micro-batch where all passes are one graph, and once per
pass where each pass has a backward of its own, as a pipeline chunk or behind recomputation. There
the count is right only if every step has as many passes as the first.
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
    """The chunks of layers on this rank, in the order of the model."""

    chunks: list[DistributedDataParallel]

    @property
    def modules(self) -> list[PonderGPTModel]:
        """The chunks without their wrapping."""
        return [chunk.module for chunk in self.chunks]

    @property
    def method(self) -> Method:
        """What the model is trained with."""
        return self.modules[0].method

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """This rank's parameters under the names they have in the whole model."""
        for module in self.modules:
            for name, parameter in module.named_parameters():
                yield name_in_whole_model(name, module), parameter

    def train(self, mode: bool = True) -> None:
        """Switch dropout and recomputation on or off."""
        for chunk in self.chunks:
            chunk.train(mode)

    def zero_grad_buffer(self) -> None:
        """Start a step."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, gradients are added up and not reduced."""
        with ExitStack() as stack:
            for chunk in self.chunks:
                stack.enter_context(chunk.no_sync())
            yield


def build_parallel_model(config: ResolvedConfig) -> ParallelModel:
    """This rank's part of a resolved run's model, with initial weights.

    Raises:
        ConfigError: the method is unknown, or the overlap asked for would not be exact.
    """
    return wrap_data_parallel(build_model_chunks(config), config)


def wrap_data_parallel(modules: list[PonderGPTModel], config: ResolvedConfig) -> ParallelModel:
    """megatron-core's DDP around each chunk, with gradients kept and reduced in fp32.

    Raises:
        ConfigError: the overlap asked for would not be exact.
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
