"""Weights under Hugging Face names and under ours: one table per architecture, read both ways.

A rule says which stock Hugging Face tensors make up one of our parameters and how. Tensors are
whole (tensor-parallel size 1) and unpadded on the Hugging Face side. Nothing here reads or writes
files, and nothing depends on the training method: thoughts add no parameters.
"""

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatron_ponder.config.layout import padded_vocab_size
from megatron_ponder.config.resolved import ResolvedModelConfig
from megatron_ponder.errors import ConversionError
from megatron_ponder.model.size import linear_biases

Join = Callable[[list[Tensor], ResolvedModelConfig], Tensor]
Split = Callable[[Tensor, ResolvedModelConfig], list[Tensor]]
Condition = Callable[[ResolvedModelConfig], bool]

OUTPUT_LAYER = "output_layer.weight"


def _always(model: ResolvedModelConfig) -> bool:
    return True


@dataclasses.dataclass(frozen=True)
class Rule:
    """`ours` is `join` of `theirs`; `theirs` is `split` of `ours`. `{i}` stands for the layer."""

    ours: str
    theirs: tuple[str, ...]
    join: Join
    split: Split
    when: Condition = _always
    """Whether a model has the parameter."""


def to_megatron(state: Mapping[str, Tensor], model: ResolvedModelConfig) -> dict[str, Tensor]:
    """Our state dict from stock Hugging Face tensors.

    Args:
        state: tensors by Hugging Face name; for tied embeddings the head may be repeated.
        model: the resolved shape.

    Raises:
        ConversionError: a tensor is missing, superfluous or has another shape than the rule needs.
    """
    result = {}
    unused = set(state)
    if not model.untie_embeddings_and_output_weights:
        unused.discard(HEADS[model.architecture])
    for rule in rules_of(model):
        missing = [name for name in rule.theirs if name not in state]
        if missing:
            raise ConversionError(
                f"The checkpoint lacks {', '.join(missing)}, needed for {rule.ours}. Is it a "
                f"{model.architecture} model with {model.num_layers} layers?"
            )
        result[rule.ours] = rule.join([state[name] for name in rule.theirs], model)
        unused -= set(rule.theirs)
    if unused:
        raise ConversionError(
            f"The checkpoint has tensors that a {model.architecture} model of this shape does not: "
            f"{', '.join(sorted(unused)[:5])}."
        )
    return result


def to_huggingface(state: Mapping[str, Tensor], model: ResolvedModelConfig) -> dict[str, Tensor]:
    """Stock Hugging Face tensors from our state dict (whole tensors); the inverse of `to_megatron`.

    A tied head is not repeated.
    """
    result: dict[str, Tensor] = {}
    for rule in rules_of(model):
        result.update(zip(rule.theirs, rule.split(state[rule.ours], model), strict=True))
    return result


def rules_of(model: ResolvedModelConfig) -> list[Rule]:
    """The rules of a model, layer numbers filled in, in the order of the layers.

    Without a head if it is tied.
    """
    rules = [rule for rule in RULES[model.architecture] if rule.when(model)]
    of_layers = [rule for rule in rules if "{i}" in rule.ours]
    first = rules.index(of_layers[0])
    behind = rules[first + len(of_layers) :]
    if not model.untie_embeddings_and_output_weights:
        behind = [rule for rule in behind if rule.ours != OUTPUT_LAYER]
    filled = [
        dataclasses.replace(
            rule, ours=rule.ours.format(i=i), theirs=tuple(name.format(i=i) for name in rule.theirs)
        )
        for i in range(model.num_layers)
        for rule in of_layers
    ]
    return [*rules[:first], *filled, *behind]


def _pad_vocab(parts: list[Tensor], model: ResolvedModelConfig) -> Tensor:
    """[vocab, h] -> [padded vocab, h]; padded rows are zero."""
    (weight,) = parts
    if weight.size(0) != model.vocab_size:
        raise ConversionError(
            f"The checkpoint's vocabulary has {weight.size(0)} rows, ours {model.vocab_size}."
        )
    padding = padded_vocab_size(model) - weight.size(0)
    return torch.cat((weight, weight.new_zeros(padding, weight.size(1))))


def _strip_vocab(weight: Tensor, model: ResolvedModelConfig) -> list[Tensor]:
    """[padded vocab, h] -> [vocab, h]."""
    return [weight[: model.vocab_size].contiguous()]


def _by_group(weight: Tensor, model: ResolvedModelConfig) -> Tensor:
    """[groups * n * d, ...] -> [groups, n, d, ...]."""
    return weight.reshape(model.num_query_groups, -1, model.kv_channels, *weight.shape[1:])


def _join_qkv(parts: list[Tensor], model: ResolvedModelConfig) -> Tensor:
    """Q [heads * d, ...], K and V [groups * d, ...] -> [groups * (heads / groups + 2) * d, ...].

    megatron-core keeps each group's queries, key and value together, so that a contiguous shard of
    rows is a set of whole groups.
    """
    rest = parts[0].shape[1:]
    by_group = [_by_group(part, model) for part in parts]
    return torch.cat(by_group, dim=1).reshape(-1, *rest)


def _split_qkv(weight: Tensor, model: ResolvedModelConfig) -> list[Tensor]:
    """The inverse of `_join_qkv`."""
    rest = weight.shape[1:]
    by_group = _by_group(weight, model)
    queries = by_group.size(1) - 2
    return [part.reshape(-1, *rest).contiguous() for part in by_group.split((queries, 1, 1), dim=1)]


def _same(ours: str, theirs: str, when: Condition = _always) -> Rule:
    return Rule(ours, (theirs,), lambda parts, _: parts[0], lambda weight, _: [weight], when)


def _transposed(ours: str, theirs: str) -> Rule:
    """GPT-2 stores linear weights as [in, out]."""
    return Rule(
        ours, (theirs,), lambda parts, _: parts[0].t().contiguous(),
        lambda weight, _: [weight.t().contiguous()],
    )  # fmt: skip


def _both(ours: str, theirs: str, rule: Callable[[str, str], Rule] = _same) -> list[Rule]:
    """Weight and bias; a bias is never transposed."""
    return [rule(f"{ours}.weight", f"{theirs}.weight"), _same(f"{ours}.bias", f"{theirs}.bias")]


def _vocabulary(ours: str, theirs: str) -> Rule:
    return Rule(ours, (theirs,), _pad_vocab, _strip_vocab)


def _fused_conv_qkv(ours: str, theirs: str) -> list[Rule]:
    """GPT-2's c_attn: [h, 3h] with Q, K, V side by side."""

    def join(parts: list[Tensor], model: ResolvedModelConfig) -> Tensor:
        return _join_qkv(list(parts[0].t().chunk(3)), model)

    def split(weight: Tensor, model: ResolvedModelConfig) -> list[Tensor]:
        return [torch.cat(_split_qkv(weight, model)).t().contiguous()]

    return [
        Rule(f"{ours}.weight", (f"{theirs}.weight",), join, split),
        Rule(f"{ours}.bias", (f"{theirs}.bias",), join, split),
    ]


_OUR_LAYER = "decoder.layers.{i}"
_LLAMA_LAYER = "model.layers.{i}"
_NEOX_LAYER = "gpt_neox.layers.{i}"
_GPT2_LAYER = "transformer.h.{i}"


def _has_qkv_bias(model: ResolvedModelConfig) -> bool:
    return linear_biases(model)[0]


def _has_projection_bias(model: ResolvedModelConfig) -> bool:
    return linear_biases(model)[1]


def _has_mlp_bias(model: ResolvedModelConfig) -> bool:
    return linear_biases(model)[2]


def _has_head_norms(model: ResolvedModelConfig) -> bool:
    return model.qk_layernorm


def _llama_qkv(part: str, when: Condition = _always) -> Rule:
    """Q, K and V apart; the same for weight and bias."""
    return Rule(
        f"{_OUR_LAYER}.self_attention.linear_qkv.{part}",
        tuple(f"{_LLAMA_LAYER}.self_attn.{p}_proj.{part}" for p in "qkv"),
        _join_qkv,
        _split_qkv,
        when,
    )


def _llama_gate_and_up(part: str, when: Condition = _always) -> Rule:
    """Gate above up projection; the same for weight and bias."""
    return Rule(
        f"{_OUR_LAYER}.mlp.linear_fc1.{part}",
        tuple(f"{_LLAMA_LAYER}.mlp.{p}_proj.{part}" for p in ("gate", "up")),
        lambda parts, _: torch.cat(parts),
        lambda weight, _: [half.contiguous() for half in weight.chunk(2)],
        when,
    )


def _llama_layer() -> list[Rule]:
    """A layer of Llama and of those that have its names: Mistral, Qwen2 and Qwen3."""
    attention, mlp = f"{_OUR_LAYER}.self_attention", f"{_OUR_LAYER}.mlp"
    their_attention, their_mlp = f"{_LLAMA_LAYER}.self_attn", f"{_LLAMA_LAYER}.mlp"
    return [
        _same(f"{_OUR_LAYER}.input_layernorm.weight", f"{_LLAMA_LAYER}.input_layernorm.weight"),
        _llama_qkv("weight"),
        _llama_qkv("bias", _has_qkv_bias),
        *(
            _same(
                f"{attention}.{p}_layernorm.weight",
                f"{their_attention}.{p}_norm.weight",
                _has_head_norms,
            )
            for p in "qk"
        ),
        _same(f"{attention}.linear_proj.weight", f"{their_attention}.o_proj.weight"),
        _same(
            f"{attention}.linear_proj.bias", f"{their_attention}.o_proj.bias", _has_projection_bias
        ),
        _same(
            f"{_OUR_LAYER}.pre_mlp_layernorm.weight",
            f"{_LLAMA_LAYER}.post_attention_layernorm.weight",
        ),
        _llama_gate_and_up("weight"),
        _llama_gate_and_up("bias", _has_mlp_bias),
        _same(f"{mlp}.linear_fc2.weight", f"{their_mlp}.down_proj.weight"),
        _same(f"{mlp}.linear_fc2.bias", f"{their_mlp}.down_proj.bias", _has_mlp_bias),
    ]


_LLAMA = [
    _vocabulary("embedding.word_embeddings.weight", "model.embed_tokens.weight"),
    *_llama_layer(),
    _same("final_norm.weight", "model.norm.weight"),
    _vocabulary(OUTPUT_LAYER, "lm_head.weight"),
]
_LLAMA_FAMILY = ("llama", "mistral", "qwen2", "qwen3")

RULES: dict[str, list[Rule]] = {
    **dict.fromkeys(_LLAMA_FAMILY, _LLAMA),
    # GPT-NeoX keeps each head's query, key and value together, as megatron-core does.
    "gpt_neox": [
        _vocabulary("embedding.word_embeddings.weight", "gpt_neox.embed_in.weight"),
        *_both(f"{_OUR_LAYER}.input_layernorm", f"{_NEOX_LAYER}.input_layernorm"),
        *_both(
            f"{_OUR_LAYER}.self_attention.linear_qkv", f"{_NEOX_LAYER}.attention.query_key_value"
        ),
        *_both(f"{_OUR_LAYER}.self_attention.linear_proj", f"{_NEOX_LAYER}.attention.dense"),
        *_both(f"{_OUR_LAYER}.pre_mlp_layernorm", f"{_NEOX_LAYER}.post_attention_layernorm"),
        *_both(f"{_OUR_LAYER}.mlp.linear_fc1", f"{_NEOX_LAYER}.mlp.dense_h_to_4h"),
        *_both(f"{_OUR_LAYER}.mlp.linear_fc2", f"{_NEOX_LAYER}.mlp.dense_4h_to_h"),
        *_both("final_norm", "gpt_neox.final_layer_norm"),
        _vocabulary(OUTPUT_LAYER, "embed_out.weight"),
    ],
    "gpt2": [
        _vocabulary("embedding.word_embeddings.weight", "transformer.wte.weight"),
        _same("embedding.position_embeddings.weight", "transformer.wpe.weight"),
        *_both(f"{_OUR_LAYER}.input_layernorm", f"{_GPT2_LAYER}.ln_1"),
        *_fused_conv_qkv(f"{_OUR_LAYER}.self_attention.linear_qkv", f"{_GPT2_LAYER}.attn.c_attn"),
        *_both(
            f"{_OUR_LAYER}.self_attention.linear_proj", f"{_GPT2_LAYER}.attn.c_proj", _transposed
        ),
        *_both(f"{_OUR_LAYER}.pre_mlp_layernorm", f"{_GPT2_LAYER}.ln_2"),
        *_both(f"{_OUR_LAYER}.mlp.linear_fc1", f"{_GPT2_LAYER}.mlp.c_fc", _transposed),
        *_both(f"{_OUR_LAYER}.mlp.linear_fc2", f"{_GPT2_LAYER}.mlp.c_proj", _transposed),
        *_both("final_norm", "transformer.ln_f"),
        _vocabulary(OUTPUT_LAYER, "lm_head.weight"),
    ],
}

BASE_PREFIXES: dict[str, str] = {
    **dict.fromkeys(_LLAMA_FAMILY, "model."),
    "gpt_neox": "gpt_neox.",
    "gpt2": "transformer.",
}
"""What names of all weights but the head start with; files of a model without its head lack it."""

HEADS: dict[str, str] = {
    architecture: rule.theirs[0]
    for architecture, rules in RULES.items()
    for rule in rules
    if rule.ours == OUTPUT_LAYER
}
"""The output layer, which a checkpoint with tied embeddings may repeat."""
