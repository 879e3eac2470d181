"""Builds megatron-core's AdamW and LR scheduler.

Depending on the run's settings, the optimizer is Adam on fp32 weights or on fp32 master copies of
bf16 weights. Its state can be sharded over the data-parallel ranks. Weight decay skips biases and
norms (every 1-D parameter). The LR scheduler counts iterations. Other optimizers are not supported,
nor is loss scaling, since there is no fp16 mode.
"""

import math

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_ponder.config.resolved import ResolvedConfig

WSD_DECAY_STYLE = "exponential"
"""Shape of WSD's final decay, Megatron-LM's default: 2 * 0.5^x - 1 for x from 0 to 1."""


def build_optimizer(
    config: ResolvedConfig, chunks: list[DistributedDataParallel]
) -> tuple[ChainedOptimizer, OptimizerParamScheduler]:
    """Build the optimizer of this rank's part of a model, and the LR scheduler.

    Args:
        config: resolved.
        chunks: the weights to train, with their gradient buffers.
    """
    optim, training = config.optimizer, config.training
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=optim.min_lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.adam_beta1,
            adam_beta2=optim.adam_beta2,
            adam_eps=optim.adam_eps,
            decoupled_weight_decay=True,
            # Infinity if clipping is off, so that the norm is still computed and reported.
            clip_grad=optim.clip_grad or math.inf,
            bf16=training.bf16,
            params_dtype=torch.bfloat16 if training.bf16 else torch.float32,
            use_distributed_optimizer=config.parallel.use_distributed_optimizer,
            overlap_param_gather=config.parallel.overlap_param_gather,
        ),
        chunks,
    )
    _use_fused_step(optimizer)
    return optimizer, build_scheduler(config, optimizer)


def _use_fused_step(optimizer: ChainedOptimizer) -> None:
    """Enable the fused update of torch's AdamW, the one megatron-core uses without TE and apex.

    megatron-core has no setting for this, and torch's default on CPU is not fused.
    """
    for chained in optimizer.chained_optimizers:
        if isinstance(chained.optimizer, torch.optim.Adam):  # AdamW is a subclass
            for group in chained.optimizer.param_groups:
                group["fused"] = True


def build_scheduler(
    config: ResolvedConfig, optimizer: MegatronOptimizer
) -> OptimizerParamScheduler:
    """Build the LR scheduler: linear warm-up from 0, then the decay in `config`, in iterations.

    As in Megatron-LM, the first iteration has learning rate 0 if there is a warm-up. The settings
    of the run override those of a checkpoint that is loaded later.
    """
    optim = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.lr_warmup_iters,
        lr_decay_steps=optim.lr_decay_iters,
        lr_decay_style=optim.lr_decay_style,
        start_wd=optim.weight_decay,
        end_wd=optim.weight_decay,
        wd_incr_steps=config.training.train_iters,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=optim.lr_wsd_decay_iters,
        lr_wsd_decay_style=WSD_DECAY_STYLE,
    )


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The learning rate of the next update, which is the same in every parameter group."""
    return float(optimizer.param_groups[0]["lr"])
