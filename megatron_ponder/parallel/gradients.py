"""Data parallelism: gradient buffers, their reduction, and what megatron-core's schedules call."""

from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)

from megatron_ponder.config.schema import RunConfig
from megatron_ponder.model.ponder_gpt_model import PonderGPTModel
from megatron_ponder.runtime.distributed import process_groups


def wrap_data_parallel(model: PonderGPTModel, config: RunConfig) -> DistributedDataParallel:
    """megatron-core's DDP around the model, with gradients kept and reduced in fp32.

    Reduction does not overlap with the backward: megatron-core starts an overlapped reduction when
    each parameter's gradient hook has run as often as in the first step, which says nothing where
    the number of passes changes from step to step.
    """
    transformer_config = model.config
    transformer_config.finalize_model_grads_func = finalize_model_grads
    return DistributedDataParallel(
        config=transformer_config,
        ddp_config=DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        ),
        module=model,
        pg_collection=process_groups(),
    )
