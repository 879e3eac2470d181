"""Translates a resolved config into megatron-core's TransformerConfig."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.enums import Fp8Recipe
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.runtime.backends import Backends

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def build_transformer_config(config: ResolvedConfig, backends: Backends) -> TransformerConfig:
    """The TransformerConfig of a resolved run."""
    model, parallel = config.model, config.parallel
    dtype = torch.bfloat16 if config.training.bf16 else torch.float32
    num_layer_chunks = parallel.num_virtual_stages_per_pipeline_rank
    has_fp8 = backends.transformer_impl == "transformer_engine"
    granularity = config.training.recompute_granularity
    recomputes_layers = granularity == "full"
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.activation == "swiglu",
        activation_func=ACTIVATIONS[model.activation],
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        # Makes megatron-core sum these norms' gradients over tensor-parallel ranks: each rank norms
        # only its own heads.
        qk_layernorm=model.qk_layernorm,
        hidden_dropout=model.hidden_dropout,
        attention_dropout=model.attention_dropout,
        bf16=config.training.bf16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_layer_chunks if num_layer_chunks > 1 else None,
        num_layers_in_first_pipeline_stage=parallel.decoder_first_pipeline_num_layers,
        num_layers_in_last_pipeline_stage=parallel.decoder_last_pipeline_num_layers,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        # Our model recomputes whole passes ("pass"), our layers the cheap activations
        # ("selective"). megatron-core recomputes only in "full".
        recompute_granularity=None if granularity == "pass" else granularity,
        recompute_modules=[],
        recompute_method=config.training.recompute_method if recomputes_layers else None,
        recompute_num_layers=config.training.recompute_num_layers if recomputes_layers else None,
        fp8=config.backend.fp8_format if has_fp8 else None,
        # Delayed scaling would update its amax history once per pass.
        fp8_recipe=Fp8Recipe.tensorwise,
        gradient_accumulation_fusion=backends.weight_gradient != "none",
        # TransformerEngine overwrites a gradient in what it takes for the first micro-batch, but
        # the backward runs the first pass last. Without this cache it always accumulates.
        disable_parameter_transpose_cache=True,
        # TransformerEngine's own choice could fall back to a kernel that stores all scores.
        attention_backend=AttnBackend.fused if backends.attention == "te" else AttnBackend.auto,
        # For our model; megatron-core's own fusion still materialises all logits.
        cross_entropy_loss_fusion=config.backend.cross_entropy_loss_fusion,
        # Gradients are summed over tokens and divided once by their number in the whole batch.
        calculate_per_token_loss=True,
        # model.init draws weights by parameter name. megatron-core's initialisation still runs,
        # since it also marks which parameters are sharded, and along which dim.
        init_method=_leave_unset,
        output_layer_init_method=_leave_unset,
        embedding_init_method=_leave_unset,
    )


def _leave_unset(weight: Tensor) -> None:
    """An initialisation that does nothing."""
