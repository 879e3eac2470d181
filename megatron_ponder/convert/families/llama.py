"""Llama. Mistral, Qwen2 and Qwen3 share its weight names and start from this family."""

import torch

from megatron_ponder.config.resolved import ResolvedModelConfig
from megatron_ponder.convert.family import SHAPE_KEYS, Family
from megatron_ponder.convert.weight_rules import (
    OUR_LAYER,
    OUTPUT_LAYER,
    Condition,
    Rule,
    always,
    join_qkv,
    same,
    split_qkv,
    vocabulary,
)
from megatron_ponder.model.size import linear_biases

LAYER = "model.layers.{i}"


def _has_qkv_bias(model: ResolvedModelConfig) -> bool:
    return linear_biases(model)[0]


def _has_projection_bias(model: ResolvedModelConfig) -> bool:
    return linear_biases(model)[1]


def _has_mlp_bias(model: ResolvedModelConfig) -> bool:
    return linear_biases(model)[2]


def _has_head_norms(model: ResolvedModelConfig) -> bool:
    return model.qk_layernorm


def _qkv(part: str, when: Condition = always) -> Rule:
    """Q, K and V apart; the same for weight and bias."""
    return Rule(
        f"{OUR_LAYER}.self_attention.linear_qkv.{part}",
        tuple(f"{LAYER}.self_attn.{p}_proj.{part}" for p in "qkv"),
        join_qkv,
        split_qkv,
        when,
    )


def _gate_and_up(part: str, when: Condition = always) -> Rule:
    """Gate above up projection; the same for weight and bias."""
    return Rule(
        f"{OUR_LAYER}.mlp.linear_fc1.{part}",
        tuple(f"{LAYER}.mlp.{p}_proj.{part}" for p in ("gate", "up")),
        lambda parts, _: torch.cat(parts),
        lambda weight, _: [half.contiguous() for half in weight.chunk(2)],
        when,
    )


def _head_norm(of: str) -> Rule:
    """The norm of each head's queries (q) or keys (k)."""
    return same(
        f"{OUR_LAYER}.self_attention.{of}_layernorm.weight",
        f"{LAYER}.self_attn.{of}_norm.weight",
        _has_head_norms,
    )


_ATTENTION, _MLP = f"{OUR_LAYER}.self_attention", f"{OUR_LAYER}.mlp"

FAMILY = Family(
    class_name="LlamaForCausalLM",
    exported_prefix="PonderLlama",
    settings={
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "parallel_residual": False,
        "rotary_percent": 1.0,
        "add_bias_linear": False,
        "add_attention_bias": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
    },
    keys=SHAPE_KEYS
    | {
        "num_query_groups": "num_key_value_heads",
        "kv_channels": "head_dim",
        "norm_epsilon": "rms_norm_eps",
    },
    defaults={
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "num_key_value_heads": None,
        "head_dim": None,
        "rms_norm_eps": 1e-6,
    },
    activations={"silu": "swiglu", "swish": "swiglu"},
    dropout_keys={"attention_dropout": "attention_dropout"},
    own_keys=frozenset({"attention_bias", "mlp_bias"}),
    no_effect=frozenset({"pretraining_tp"}),
    base_prefix="model.",
    rules=(
        vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
        same(f"{OUR_LAYER}.input_layernorm.weight", f"{LAYER}.input_layernorm.weight"),
        _qkv("weight"),
        _qkv("bias", _has_qkv_bias),
        _head_norm("q"),
        _head_norm("k"),
        same(f"{_ATTENTION}.linear_proj.weight", f"{LAYER}.self_attn.o_proj.weight"),
        same(
            f"{_ATTENTION}.linear_proj.bias",
            f"{LAYER}.self_attn.o_proj.bias",
            _has_projection_bias,
        ),
        same(f"{OUR_LAYER}.pre_mlp_layernorm.weight", f"{LAYER}.post_attention_layernorm.weight"),
        _gate_and_up("weight"),
        _gate_and_up("bias", _has_mlp_bias),
        same(f"{_MLP}.linear_fc2.weight", f"{LAYER}.mlp.down_proj.weight"),
        same(f"{_MLP}.linear_fc2.bias", f"{LAYER}.mlp.down_proj.bias", _has_mlp_bias),
        same("final_norm.weight", "model.norm.weight"),
        vocabulary(OUTPUT_LAYER, "lm_head.weight"),
    ),
)
