"""Which modules a layer is made of. Only this file of the package looks at the architecture."""

import dataclasses
import functools
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import BackendError
from megatron_ponder.model.attention import RotarySelfAttention, SdpaCoreAttention
from megatron_ponder.model.layer import (
    ParallelResidualLayer,
    SequentialResidualLayer,
    get_bias_dropout_add,
)
from megatron_ponder.model.mlp import SwigluMLP
from megatron_ponder.model.norm import Norm
from megatron_ponder.runtime.capabilities import has_transformer_engine


def layer_spec(config: RunConfig) -> ModuleSpec:
    """megatron-core's local layer with our attention, norms, gated MLP and residual add.

    Starts from megatron-core's own spec, so that what it changes between versions (how `mlp` is
    described, for one) stays its own business. Checkpoint keys of the norms are mapped to those of
    the fused TransformerEngine layers, which makes checkpoints of both interchangeable.
    """
    model = config.model
    local = get_gpt_layer_local_spec(normalization=model.normalization).submodules
    attention = local.self_attention
    head_norms = dict.fromkeys(("q_layernorm", "k_layernorm"), Norm if model.qk_layernorm else None)
    return ModuleSpec(
        module=ParallelResidualLayer if model.parallel_residual else SequentialResidualLayer,
        submodules=dataclasses.replace(
            local,
            input_layernorm=Norm,
            pre_mlp_layernorm=Norm,
            self_attention=ModuleSpec(
                module=RotarySelfAttention,
                params={**attention.params, "add_attention_bias": model.add_attention_bias},
                submodules=dataclasses.replace(
                    attention.submodules, core_attention=_core_attention(config), **head_norms
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=_gated(local.mlp) if model.activation == "swiglu" else local.mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def _core_attention(config: RunConfig) -> type[torch.nn.Module]:
    """Our attention, or TransformerEngine's ring where ranks share a sequence.

    The ring shards a sequence as we do, so nothing else changes; its fused kernels need bf16.

    Raises:
        BackendError: the ring was asked for and is not there.
    """
    wanted = config.parallel.context_parallel_attention
    if config.parallel.context_parallel_size == 1 or wanted == "gather":
        return SdpaCoreAttention
    if not has_transformer_engine():
        if wanted == "transformer_engine":
            raise BackendError(
                "--context-parallel-attention transformer_engine needs a CUDA device and "
                "TransformerEngine, and one of them is missing here. Use auto or gather."
            )
        return SdpaCoreAttention
    if wanted == "auto" and not config.training.bf16:
        return SdpaCoreAttention
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return TEDotProductAttention


def _gated(mlp: Any) -> Any:
    """megatron-core's description of an MLP, with our class: a spec (0.16), or a call (0.19)."""
    if isinstance(mlp, ModuleSpec):
        return ModuleSpec(module=SwigluMLP, submodules=mlp.submodules)
    return functools.partial(SwigluMLP.as_mlp_submodule, **mlp.keywords)
