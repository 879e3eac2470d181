"""How large a model is and what a forward costs, from its shape alone. Plain arithmetic, no torch.

Parameters are those of the stock model that an export gives: without the rows that pad the
vocabulary. Thoughts add none.

Floating-point operations are those of matrix products, two per multiplication and addition:

    linear     2 x slots x weights of the layers' linear modules
    attention  Q K^T and the weighted sum of V, half of the square: 2 x slots^2 x heads x d a layer
    head       2 x tokens x hidden x vocabulary, once, in the pass that the loss reads
    mixture    the head and its counterpart with the embeddings, 4 x slots read x hidden x
               vocabulary, in every pass whose carry is a mixture of embeddings

A pass with n stages has n x tokens slots. Norms, activations, softmax, rotary positions, biases and
embedding look-ups are not counted, and neither are the rows that pad the vocabulary, nor anything
that is computed twice to save memory. Causal attention is counted as half of the square, which is
what an ideal kernel does; a kernel that computes the whole square gets no credit for it. In the
last layer, slots that nobody reads are counted up to the attention: that is what is run.

The backward of a matrix product is two products of the same size: in training a pass with a
gradient costs three times its forward, one without its forward only (`FlopCounts.training`).
"""

import dataclasses

from megatron_ponder.config.resolved import ResolvedModelConfig
from megatron_ponder.ponder.plan import PassPlan


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Number of parameters by part of the model."""

    embedding: int
    """Token embeddings, vocab x h."""
    positions: int
    """Learned positions; 0 with rotary ones."""
    layers: int
    """All transformer layers."""
    final_norm: int
    """The norm behind the last layer."""
    head: int
    """Output layer; 0 where it is tied to the embedding."""
    total: int
    """All of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassFlops:
    """FLOPs of one pass over one sequence."""

    linear: int
    """Linear modules of the layers."""
    attention: int
    """Causal attention, half of the square."""
    head: int
    """Output layer; 0 in all passes but the last."""
    mixture: int
    """Output layer and weighted sum of embeddings; 0 in passes that mix none."""
    has_grad: bool
    """Whether the backward goes through the pass."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.linear + self.attention + self.head + self.mixture


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlopCounts:
    """FLOPs of one forward over one sequence."""

    passes: tuple[PassFlops, ...]
    """In the order of the plan."""

    @property
    def total(self) -> int:
        """All passes."""
        return sum(p.total for p in self.passes)

    @property
    def training(self) -> int:
        """Forward and backward of all passes; nothing that is recomputed is counted again."""
        return sum((3 if p.has_grad else 1) * p.total for p in self.passes)


def count_parameters(model: ResolvedModelConfig) -> ParameterCounts:
    """Parameters of a model.

    Args:
        model: resolved.
    """
    hidden = model.hidden_size
    has_learned_positions = model.position_embedding_type == "learned_absolute"
    norm = hidden * (2 if model.normalization == "LayerNorm" else 1)
    modules = linear_modules(model)
    layer = sum(inputs * outputs for inputs, outputs in modules) + 2 * norm
    layer += sum(
        outputs
        for (_, outputs), has_bias in zip(modules, linear_biases(model), strict=True)
        if has_bias
    )
    layer += head_norm_parameters(model)
    embedding = model.vocab_size * hidden
    positions = model.max_position_embeddings * hidden if has_learned_positions else 0
    layers = model.num_layers * layer
    head = embedding if model.untie_embeddings_and_output_weights else 0
    return ParameterCounts(
        embedding=embedding,
        positions=positions,
        layers=layers,
        final_norm=norm,
        head=head,
        total=embedding + positions + layers + norm + head,
    )


def forward_flops(model: ResolvedModelConfig, plan: PassPlan, seq_length: int) -> FlopCounts:
    """FLOPs of one forward over one sequence; the module says what is counted.

    Args:
        model: resolved.
        plan: the passes that are run.
        seq_length: tokens in the sequence.
    """
    weights = [inputs * outputs for inputs, outputs in linear_modules(model)]
    attention_width = model.num_attention_heads * model.kv_channels
    head = 2 * seq_length * model.hidden_size * model.vocab_size
    passes = []
    for pass_ in plan.passes:
        slots, read_slots = pass_.slots_per_token * seq_length, pass_.outputs_per_token * seq_length
        last_layer = slots * weights[0] + read_slots * sum(weights[1:])
        passes.append(
            PassFlops(
                linear=2 * ((model.num_layers - 1) * slots * sum(weights) + last_layer),
                attention=model.num_layers * 2 * slots**2 * attention_width,
                head=head if plan.is_last(pass_) else 0,
                mixture=2 * head * pass_.outputs_per_token if pass_.mixes_embeddings else 0,
                has_grad=plan.has_grad(pass_),
            )
        )
    return FlopCounts(passes=tuple(passes))


def linear_biases(model: ResolvedModelConfig) -> tuple[bool, bool, bool, bool]:
    """Whether QKV, attention output, MLP in and MLP out have biases."""
    of_attention = model.add_bias_linear or model.add_attention_bias
    of_mlp = model.add_bias_linear
    return of_attention or model.add_qkv_bias, of_attention, of_mlp, of_mlp


def head_norm_parameters(model: ResolvedModelConfig) -> int:
    """Parameters of the norms of queries and keys of a layer, which every rank has whole."""
    if not model.qk_layernorm:
        return 0
    return 2 * model.kv_channels * (2 if model.normalization == "LayerNorm" else 1)


def linear_modules(model: ResolvedModelConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of a layer's linear modules: QKV, attention output, MLP in, MLP out."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    attention_width = model.num_attention_heads * model.kv_channels
    qkv_width = attention_width + 2 * model.num_query_groups * model.kv_channels
    mlp_width = 2 * ffn if model.activation == "swiglu" else ffn
    return [(hidden, qkv_width), (attention_width, hidden), (hidden, mlp_width), (ffn, hidden)]
