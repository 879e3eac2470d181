"""The modules of a transformer layer, chosen by named settings and backends."""

import dataclasses
import functools
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_ponder.config.resolved import ResolvedConfig, ResolvedModelConfig
from megatron_ponder.model.attention import RotarySelfAttention, SdpaCoreAttention
from megatron_ponder.model.flash_attention import FlashCoreAttention
from megatron_ponder.model.layer import ParallelResidualLayer, SequentialResidualLayer
from megatron_ponder.model.mlp import GeluMLP, SwigluMLP, TanhGeluMLP
from megatron_ponder.model.norm import Norm
from megatron_ponder.runtime.backends import Backends

MLPS: dict[str, type[MLP]] = {"swiglu": SwigluMLP, "gelu": GeluMLP, "gelu_tanh": TanhGeluMLP}


def layer_spec(config: ResolvedConfig, backends: Backends) -> ModuleSpec:
    """megatron-core's layer with our attention and MLP, in our layer.

    Starts from megatron-core's own specs, which differ between versions (in the form of `mlp`, for
    example). Linear layers are megatron-core's on torch, or TransformerEngine's with the norms
    inside.
    """
    model = config.model
    is_local = backends.transformer_impl == "local"
    submodules = _local_layer(model) if is_local else _transformer_engine_layer()
    attention = submodules.self_attention
    head_norms = dict.fromkeys(("q_layernorm", "k_layernorm"), Norm if model.qk_layernorm else None)
    return ModuleSpec(
        module=ParallelResidualLayer if model.parallel_residual else SequentialResidualLayer,
        submodules=dataclasses.replace(
            submodules,
            self_attention=ModuleSpec(
                module=RotarySelfAttention,
                params={**attention.params, "add_attention_bias": model.add_attention_bias},
                submodules=dataclasses.replace(
                    attention.submodules, core_attention=_core_attention(backends), **head_norms
                ),
            ),
            mlp=_on_our_kernels(submodules.mlp, MLPS[model.activation]),
        ),
    )


def _local_layer(model: ResolvedModelConfig) -> Any:
    """megatron-core's linear layers, our norms.

    Checkpoint keys of the norms are mapped to those of the fused TransformerEngine layers, which
    makes checkpoints of both interchangeable.
    """
    return dataclasses.replace(
        get_gpt_layer_local_spec(normalization=model.normalization).submodules,
        input_layernorm=Norm,
        pre_mlp_layernorm=Norm,
        sharded_state_dict_keys_map={
            "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        },
    )


def _transformer_engine_layer() -> Any:
    """TransformerEngine's linear layers; the first of each branch norms its input.

    The norm modules of the layer are the identity.
    """
    return get_gpt_layer_with_transformer_engine_spec().submodules


def _core_attention(backends: Backends) -> type[torch.nn.Module]:
    """Ours on torch or flash-attn, or TransformerEngine's.

    Both shard a sequence over context-parallel ranks in the same way.
    """
    if backends.attention == "te":
        from megatron.core.extensions.transformer_engine import TEDotProductAttention

        attention: type[torch.nn.Module] = TEDotProductAttention
        return attention
    return FlashCoreAttention if backends.attention == "flash" else SdpaCoreAttention


def _on_our_kernels(mlp: Any, ours: type[MLP]) -> Any:
    """megatron-core's description of an MLP, with our class: a spec (0.16), or a call (0.19)."""
    if isinstance(mlp, ModuleSpec):
        return ModuleSpec(module=ours, submodules=mlp.submodules)
    return functools.partial(ours.as_mlp_submodule, **mlp.keywords)
