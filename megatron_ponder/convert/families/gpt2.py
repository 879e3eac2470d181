"""GPT-2. Its linear weights are [in, out], with Q, K and V side by side."""

import torch
from torch import Tensor

from megatron_ponder.config.resolved import ResolvedModelConfig
from megatron_ponder.convert.family import LAYER_NORM_SETTINGS, Family
from megatron_ponder.convert.weight_rules import (
    OUR_LAYER,
    OUTPUT_LAYER,
    Rule,
    both,
    join_qkv,
    same,
    split_qkv,
    vocabulary,
)

LAYER = "transformer.h.{i}"


def _transposed(ours: str, theirs: str) -> Rule:
    """A weight [in, out]."""
    return Rule(
        ours, (theirs,), lambda parts, _: parts[0].t().contiguous(),
        lambda weight, _: [weight.t().contiguous()],
    )  # fmt: skip


def _qkv(part: str) -> Rule:
    """c_attn: weight [h, 3h] or bias [3h]."""

    def join(parts: list[Tensor], model: ResolvedModelConfig) -> Tensor:
        return join_qkv(list(parts[0].t().chunk(3)), model)

    def split(weight: Tensor, model: ResolvedModelConfig) -> list[Tensor]:
        return [torch.cat(split_qkv(weight, model)).t().contiguous()]

    ours = f"{OUR_LAYER}.self_attention.linear_qkv.{part}"
    return Rule(ours, (f"{LAYER}.attn.c_attn.{part}",), join, split)


_HEADS_KEYS = (
    "n_ctx summary_type summary_use_proj summary_activation summary_proj_to_labels "
    "summary_first_dropout"
)

FAMILY = Family(
    class_name="GPT2LMHeadModel",
    exported_prefix="PonderGPT2",
    settings=LAYER_NORM_SETTINGS
    | {"position_embedding_type": "learned_absolute", "parallel_residual": False},
    keys={
        "num_layers": "n_layer",
        "hidden_size": "n_embd",
        "ffn_hidden_size": "n_inner",
        "num_attention_heads": "n_head",
        "vocab_size": "vocab_size",
        "max_position_embeddings": "n_positions",
        "norm_epsilon": "layer_norm_epsilon",
        "init_method_std": "initializer_range",
    },
    defaults={
        "n_inner": None,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
    },
    activation_key="activation_function",
    activations={"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
    dropout_keys={
        "resid_pdrop": "hidden_dropout",
        "embd_pdrop": "hidden_dropout",
        "attn_pdrop": "attention_dropout",
    },
    tied_by_default=True,
    rotary_base_key=None,
    must_be={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    },
    no_effect=frozenset(_HEADS_KEYS.split()),
    base_prefix="transformer.",
    rules=(
        vocabulary("embedding.word_embeddings.weight", "transformer.wte.weight"),
        same("embedding.position_embeddings.weight", "transformer.wpe.weight"),
        *both(f"{OUR_LAYER}.input_layernorm", f"{LAYER}.ln_1"),
        _qkv("weight"),
        _qkv("bias"),
        *both(f"{OUR_LAYER}.self_attention.linear_proj", f"{LAYER}.attn.c_proj", _transposed),
        *both(f"{OUR_LAYER}.pre_mlp_layernorm", f"{LAYER}.ln_2"),
        *both(f"{OUR_LAYER}.mlp.linear_fc1", f"{LAYER}.mlp.c_fc", _transposed),
        *both(f"{OUR_LAYER}.mlp.linear_fc2", f"{LAYER}.mlp.c_proj", _transposed),
        *both("final_norm", "transformer.ln_f"),
        vocabulary(OUTPUT_LAYER, "lm_head.weight"),
    ),
)
