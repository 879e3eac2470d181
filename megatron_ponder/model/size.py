"""Parameters and FLOPs of a model, from its shape alone. Plain arithmetic, no torch.

Parameters are those of the exported stock model, without the rows that pad the vocabulary. Thoughts
add none.

FLOPs are those of matmuls, two per multiply-add:

    linear     2 x slots x weights of the layers' linear modules
    attention  Q K^T and the weighted sum of V, half of the square: 2 x slots^2 x heads x d a layer
    head       2 x tokens x hidden x vocabulary, once, in the last pass
    mixture    the head and its counterpart with the embeddings, 4 x output slots x hidden x
               vocabulary, in every pass whose carry is a mixture of embeddings

A pass with n slots per token has n x tokens slots. Norms, activations, softmax, rotary positions,
biases, embedding lookups, padding rows of the vocabulary and recompute are not counted. Causal
attention counts as half of the square, which is what an ideal kernel computes; a kernel that
computes the whole square gets no credit for it. The last layer computes only the output slots after
its attention, and is counted so.

The backward of a matmul is two matmuls of the same size. In training a pass with gradient costs
three times its forward; a pass without gradient costs its forward (`FlopCounts.training`).
"""

import dataclasses

from megatron_ponder.config.resolved import ResolvedModelConfig
from megatron_ponder.ponder.plan import Pass, PassPlan


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
    """The norm after the last layer."""
    head: int
    """Output layer; 0 if tied to the embedding."""
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
    """Output layer and weighted sum of embeddings; 0 in passes without a mixture."""
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
        """Forward and backward of all passes; recompute is not counted."""
        return sum((3 if p.has_grad else 1) * p.total for p in self.passes)


def count_parameters(model: ResolvedModelConfig) -> ParameterCounts:
    """Parameters of a model.

    Args:
        model: resolved.
    """
    hidden = model.hidden_size
    has_learned_positions = model.position_embedding_type == "learned_absolute"
    norm = norm_parameters(model, hidden)
    embedding = model.vocab_size * hidden
    positions = model.max_position_embeddings * hidden if has_learned_positions else 0
    layers = model.num_layers * layer_parameters(model)
    head = embedding if model.untie_embeddings_and_output_weights else 0
    return ParameterCounts(
        embedding=embedding,
        positions=positions,
        layers=layers,
        final_norm=norm,
        head=head,
        total=embedding + positions + layers + norm + head,
    )


def layer_parameters(model: ResolvedModelConfig, tensor_parallel_size: int = 1) -> int:
    """Parameters of a layer on one tensor-parallel rank.

    Norms and the biases of row-parallel modules (attention output, MLP out) are on every rank.

    Args:
        model: resolved.
        tensor_parallel_size: ranks that share the layer.
    """
    modules = linear_modules(model, tensor_parallel_size)
    weights = sum(inputs * outputs for inputs, outputs in modules)
    biases = sum(
        outputs
        for (_, outputs), has_bias in zip(modules, linear_biases(model), strict=True)
        if has_bias
    )
    norms = 2 * norm_parameters(model, model.hidden_size) + head_norm_parameters(model)
    return weights + biases + norms


def norm_parameters(model: ResolvedModelConfig, width: int) -> int:
    """Parameters of one norm: a scale, and with LayerNorm a shift."""
    return width * (2 if model.normalization == "LayerNorm" else 1)


def forward_flops(model: ResolvedModelConfig, plan: PassPlan, seq_length: int) -> FlopCounts:
    """FLOPs of one forward over one sequence; the module says what is counted.

    Args:
        model: resolved.
        plan: the passes that are run.
        seq_length: tokens in the sequence.
    """
    head = 2 * seq_length * model.hidden_size * model.vocab_size
    passes = []
    for pass_ in plan.passes:
        inner, attention = layer_flops(model, pass_, seq_length, is_last_layer=False)
        last, _ = layer_flops(model, pass_, seq_length, is_last_layer=True)
        passes.append(
            PassFlops(
                linear=(model.num_layers - 1) * inner + last,
                attention=model.num_layers * attention,
                head=head if plan.is_last(pass_) else 0,
                mixture=2 * head * pass_.outputs_per_token if pass_.mixes_embeddings else 0,
                has_grad=plan.has_grad(pass_),
            )
        )
    return FlopCounts(passes=tuple(passes))


def layer_flops(
    model: ResolvedModelConfig, pass_: Pass, seq_length: int, *, is_last_layer: bool
) -> tuple[int, int]:
    """FLOPs of one layer in a pass over one sequence: linear modules, and attention.

    Args:
        model: resolved.
        pass_: the pass.
        seq_length: tokens in the sequence.
        is_last_layer: of the model, which drops unused slots after its attention.
    """
    slots = pass_.slots_per_token * seq_length
    used = pass_.outputs_per_token * seq_length if is_last_layer else slots
    qkv, *others = (inputs * outputs for inputs, outputs in linear_modules(model))
    attention_width = model.num_attention_heads * model.kv_channels
    return 2 * (slots * qkv + used * sum(others)), 2 * slots**2 * attention_width


def linear_biases(model: ResolvedModelConfig) -> tuple[bool, bool, bool, bool]:
    """Whether QKV, attention output, MLP in and MLP out have biases."""
    of_attention = model.add_bias_linear or model.add_attention_bias
    of_mlp = model.add_bias_linear
    return of_attention or model.add_qkv_bias, of_attention, of_mlp, of_mlp


def head_norm_parameters(model: ResolvedModelConfig) -> int:
    """Parameters of the norms of queries and keys of a layer, which every rank has whole."""
    if not model.qk_layernorm:
        return 0
    return 2 * norm_parameters(model, model.kv_channels)


def linear_modules(
    model: ResolvedModelConfig, tensor_parallel_size: int = 1
) -> list[tuple[int, int]]:
    """(inputs, outputs) of a layer's linear modules: QKV, attention output, MLP in, MLP out.

    Args:
        model: resolved.
        tensor_parallel_size: ranks that share the layer; widths are those of one of them.
    """
    hidden, ffn = model.hidden_size, model.ffn_hidden_size // tensor_parallel_size
    attention_width = model.num_attention_heads * model.kv_channels // tensor_parallel_size
    key_value_width = model.num_query_groups * model.kv_channels // tensor_parallel_size
    qkv_width = attention_width + 2 * key_value_width
    mlp_width = 2 * ffn if model.activation == "swiglu" else ffn
    return [(hidden, qkv_width), (attention_width, hidden), (hidden, mlp_width), (ffn, hidden)]
