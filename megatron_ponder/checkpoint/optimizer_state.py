"""The optimizer's part of a checkpoint, loaded into whichever optimizer the run has.

Adam's two means lie under the same keys whatever wrote them. What differs between megatron-core's
fp32 optimizer, its bf16 optimizer and the distributed optimizer is where fp32 weights are stored,
and the non-tensor rest, of which only the number of updates is information: everything else are
settings, and the run's own count. So the rest is written anew here, and stored fp32 weights are
asked for under the name they have in the checkpoint. That lets a run switch the distributed
optimizer, or bf16, on and off.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params

from megatron_ponder.config.resolved import ResolvedConfig

SHARDING_TYPE = "fully_reshardable"
METADATA = {"distrib_optim_sharding_type": SHARDING_TYPE, "chained_optim_avoid_prefix": True}
"""How megatron-core is to shard: every state tensor in the shape of its parameter, so that any
layout can read what another wrote."""


def optimizer_request(
    optimizer: MegatronOptimizer,
    model_state: ShardedStateDict,
    *,
    stored: ResolvedConfig,
    ours: ResolvedConfig,
) -> ShardedStateDict:
    """What to ask a checkpoint for, under the checkpoint's names.

    Args:
        optimizer: the run's; its state tensors are allocated.
        model_state: the model's sharded state, with the parameters themselves in it.
        stored: the config of the run that wrote the checkpoint.
        ours: the config of this run.
    """
    inner = _only_part(optimizer).optimizer
    if isinstance(inner, torch.optim.AdamW):
        _allocate_adam_state(inner)
    request = optimizer.sharded_state_dict(model_state, is_loading=True, metadata=METADATA)
    here = master_weights_prefix(ours)
    if here:
        apply_prefix_mapping(request, {here: master_weights_prefix(stored)})
    return request


def load_optimizer(optimizer: MegatronOptimizer, loaded: dict[str, Any], num_updates: int) -> None:
    """Fill the optimizer with what its request brought.

    Args:
        optimizer: the run's.
        loaded: the loaded request.
        num_updates: updates made so far: Adam's step.
    """
    part = _only_part(optimizer)
    inner = part.optimizer
    groups = [{**group, "step": num_updates} for group in inner.state_dict()["param_groups"]]
    if isinstance(part, DistributedOptimizer):
        _load_distributed(part, loaded["param_state"], groups, num_updates)
        return
    is_nested = isinstance(part, Float16OptimizerWithFloat16Params)
    target = loaded["optimizer"] if is_nested else loaded
    target["param_groups"] = groups
    target["state"]["common_step"] = torch.tensor(float(num_updates))
    optimizer.load_state_dict(loaded)


def _load_distributed(
    part: DistributedOptimizer, param_state: Any, groups: list[dict[str, Any]], num_updates: int
) -> None:
    """Load the distributed optimizer, around two faults of its way with torch's AdamW.

    In 0.16.1 to 0.19.x `load_state_dict` gives one step tensor to all parameters, which AdamW then
    advances once per parameter; and `load_parameter_state_from_fully_reshardable` asks the
    checkpoint for a step per parameter, which it does not store.
    """
    for group in groups:
        del group["params"]
    part.load_state_dict({"optimizer": {"param_groups": groups}})
    states = [state for state in part.optimizer.state.values() if "step" in state]
    for state in states:
        del state["step"]
    part.load_parameter_state_from_fully_reshardable(param_state)
    for state in states:
        # Beside the moments: where the fused update reads it.
        state["step"] = torch.tensor(float(num_updates), device=state["exp_avg"].device)


def master_weights_prefix(config: ResolvedConfig) -> str:
    """What the key of a weight starts with where a run stores it in fp32."""
    if config.parallel.use_distributed_optimizer:
        return "optimizer.state.param."
    return "optimizer.state.fp32_param." if config.training.bf16 else ""


def _only_part(optimizer: MegatronOptimizer) -> Any:
    """The one optimizer that megatron-core's chain holds for a dense model."""
    assert isinstance(optimizer, ChainedOptimizer) and len(optimizer.chained_optimizers) == 1
    return optimizer.chained_optimizers[0]


def _allocate_adam_state(inner: torch.optim.AdamW) -> None:
    """State tensors as before the first update.

    DistributedOptimizer.state_dict (0.16.1 to 0.19.x) asks every parameter for its step and fails
    on an optimizer that has not stepped yet, which is what one is before a load.
    """
    for group in inner.param_groups:
        for parameter in group["params"]:
            if not inner.state[parameter]:
                inner.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter.data),
                    "exp_avg_sq": torch.zeros_like(parameter.data),
                }
