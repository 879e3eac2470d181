"""The same models and methods in plain PyTorch, in one process.

Two uses: the baseline of `benchmark.train`, and an oracle for tests on shapes for which there is no
golden case. For the latter it shares no code with `ponder/` and `model/`: attention, positions,
passes and loss are written down here a second time, batch first, one module per architecture, with
the parameter names of Hugging Face transformers, so that stock weights load with `load_state_dict`.
It is what one would write without megatron-core, with torch's fused attention and norms.

Left out: parallelism, dropout, padding of the vocabulary, caches, and every combination of settings
that the three stock architectures do not have. Mixed precision is `torch.autocast`, the caller's.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ponder.config.schema import MethodConfig, ModelConfig, RunConfig
from megatron_ponder.errors import ConfigError

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines [slots, d_rotated] of a sequence's positions."""


def build_reference(config: RunConfig) -> "ReferenceModel":
    """The plain model of a resolved run, with torch's default initial weights.

    Raises:
        ConfigError: settings that the reference does not have.
    """
    shape, method = config.model, config.method
    required: dict[str, object] = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    required |= STOCK_SETTINGS[shape.architecture]
    problems = [
        f"--{name.replace('_', '-')} {getattr(shape, name)}: the plain PyTorch reference has "
        f"{value} only (architecture {shape.architecture})."
        for name, value in required.items()
        if getattr(shape, name) != value
    ]
    architecture = ARCHITECTURES[shape.architecture]
    if shape.num_query_groups != shape.num_attention_heads and not architecture.has_query_groups:
        problems.append(
            f"--num-query-groups {shape.num_query_groups}: the plain PyTorch reference has as many "
            f"as heads (architecture {shape.architecture})."
        )
    if method.method not in IS_THINKING:
        known = ", ".join(IS_THINKING)
        problems.append(f"--method {method.method}: the plain PyTorch reference has {known} only.")
    if problems:
        raise ConfigError("\n".join(problems))
    return architecture(shape, method)


class ReferenceModel(nn.Module):
    """A language model that may think before each token.

    Subclasses build the modules and say where they are; the thinking is here, for all of them.
    """

    token_embedding: ClassVar[str]
    """Path of the table of token embeddings."""
    layers: ClassVar[str]
    """Path of the layers: called with slots [b, slots, h] and the rotary table."""
    final_norm: ClassVar[str]
    """Path of the norm behind the last layer."""
    head: ClassVar[str]
    """Path of the module whose weight [v, h] is the output layer's."""
    has_query_groups: ClassVar[bool] = False
    """Whether several heads may share keys and values."""

    def __init__(self, shape: ModelConfig, method: MethodConfig) -> None:
        super().__init__()
        self.shape = shape
        is_thinking = IS_THINKING[method.method]
        self.num_thoughts = method.num_latent_thoughts if is_thinking else 0
        self.has_scaled_embeddings = is_thinking and method.scale_embeds

    def forward(self, tokens: Tensor, num_jacobi_iterations: int) -> Tensor:
        """Logits of the next token at every token.

        Args:
            tokens: int64 [b, s].
            num_jacobi_iterations: R.

        Returns:
            [b, s, v].
        """
        k = self.num_thoughts
        # Dim 2 is the stage: 0 the token itself, j its j-th thought.
        embeddings = self.embed(tokens).unsqueeze(2)  # [b, s, h] -> [b, s, 1, h]
        stages = embeddings
        for _ in range(k):
            thoughts = self.think(stages, slice(None))
            stages = torch.cat((embeddings, thoughts), dim=2)
        for _ in range(num_jacobi_iterations if k else 0):
            thoughts = self.think(stages, slice(0, k))
            stages = torch.cat((embeddings, thoughts), dim=2)
        last = self.think(stages, slice(k, k + 1)).squeeze(2)  # [b, s, 1, h] -> [b, s, h]
        return F.linear(last, self.get_submodule(self.head).get_parameter("weight"))

    def embed(self, tokens: Tensor) -> Tensor:
        """[b, s] -> [b, s, h], scaled where the method says so."""
        embeddings = self.get_submodule(self.token_embedding)(tokens)
        if self.has_scaled_embeddings:
            scale = torch.tensor(math.sqrt(2.5 * self.shape.hidden_size), dtype=embeddings.dtype)
            embeddings = embeddings * scale.item()
        return embeddings

    def think(self, stages: Tensor, kept: slice) -> Tensor:
        """Run the layers over all stages: [b, s, n, h] -> the kept stages, normed, [b, s, m, h]."""
        b, s, n, h = stages.shape
        positions = torch.arange(s, device=stages.device).repeat_interleave(n)
        # [b, s, n, h] -> [b, s*n, h] and back
        hidden = self.run_layers(stages.reshape(b, s * n, h), positions)
        return self.get_submodule(self.final_norm)(hidden.view(b, s, n, h)[:, :, kept])

    def run_layers(self, slots: Tensor, positions: Tensor) -> Tensor:
        """All layers, causally over slots [b, slots, h] at the given positions [slots]."""
        rotary = rotary_table(self.shape, positions)
        for layer in self.get_submodule(self.layers).children():
            slots = layer(slots, rotary)
        return slots


def loss_function(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of logits [b, s, v] and the token after each, int64 [b, s]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def rotary_table(shape: ModelConfig, positions: Tensor) -> Rotary:
    """Cosines and sines of position x base^(-2i/d), for the d channels that are rotated."""
    assert shape.kv_channels is not None
    d = int(shape.rotary_percent * shape.kv_channels)
    exponents = torch.arange(0, d, 2, device=positions.device).float() / d
    angles = positions.float()[:, None] / shape.rotary_base**exponents
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Rotate channel pairs (i, i + d/2) of the first d channels of x, [b, heads, slots, c]."""
    cos, sin = (table.to(x.dtype) for table in rotary)
    d = cos.size(-1)
    rotated, rest = x[..., :d], x[..., d:]
    first, second = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((rotated, rest), dim=-1) if rest.size(-1) else rotated


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention: [b, heads, slots, d] (key and value may have fewer) -> [b, slots, h]."""
    grouped = key.size(1) < query.size(1)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2).flatten(2)  # [b, heads, slots, d] -> [b, slots, heads * d]


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[b, slots, heads * d] -> [b, heads, slots, d]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class Llama(ReferenceModel):
    """RMSNorm, rotary positions, gated MLP, grouped queries, no biases."""

    token_embedding = "model.embed_tokens"
    layers = "model.layers"
    final_norm = "model.norm"
    head = "lm_head"
    has_query_groups = True

    def __init__(self, shape: ModelConfig, method: MethodConfig) -> None:
        super().__init__(shape, method)
        v, h = _vocabulary(shape)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(v, h)
        self.model.layers = nn.ModuleList(LlamaLayer(shape) for _ in range(shape.num_layers))
        self.model.norm = nn.RMSNorm(h, shape.norm_epsilon)
        self.lm_head = nn.Linear(h, v, bias=False)


class LlamaLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        assert shape.num_query_groups is not None
        self.num_heads, self.num_groups = shape.num_attention_heads, shape.num_query_groups
        h, d, f = _widths(shape)
        self.input_layernorm = nn.RMSNorm(h, shape.norm_epsilon)
        self.post_attention_layernorm = nn.RMSNorm(h, shape.norm_epsilon)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(h, self.num_heads * d, bias=False),
                "k_proj": nn.Linear(h, self.num_groups * d, bias=False),
                "v_proj": nn.Linear(h, self.num_groups * d, bias=False),
                "o_proj": nn.Linear(self.num_heads * d, h, bias=False),
            }
        )
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(h, f, bias=False),
                "up_proj": nn.Linear(h, f, bias=False),
                "down_proj": nn.Linear(f, h, bias=False),
            }
        )

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """[b, slots, h] -> [b, slots, h]."""
        x = x + self._attention(self.input_layernorm(x), rotary)
        y = self.post_attention_layernorm(x)
        gated = F.silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y)
        return x + self.mlp["down_proj"](gated)

    def _attention(self, x: Tensor, rotary: Rotary) -> Tensor:
        query = split_heads(self.self_attn["q_proj"](x), self.num_heads)
        key = split_heads(self.self_attn["k_proj"](x), self.num_groups)
        value = split_heads(self.self_attn["v_proj"](x), self.num_groups)
        return self.self_attn["o_proj"](attend(rotate(query, rotary), rotate(key, rotary), value))


class GptNeox(ReferenceModel):
    """LayerNorm, partly rotary positions, exact GELU, biases, parallel or sequential residual."""

    token_embedding = "gpt_neox.embed_in"
    layers = "gpt_neox.layers"
    final_norm = "gpt_neox.final_layer_norm"
    head = "embed_out"

    def __init__(self, shape: ModelConfig, method: MethodConfig) -> None:
        super().__init__(shape, method)
        v, h = _vocabulary(shape)
        self.gpt_neox = nn.Module()
        self.gpt_neox.embed_in = nn.Embedding(v, h)
        self.gpt_neox.layers = nn.ModuleList(GptNeoxLayer(shape) for _ in range(shape.num_layers))
        self.gpt_neox.final_layer_norm = nn.LayerNorm(h, shape.norm_epsilon)
        self.embed_out = nn.Linear(h, v, bias=False)


class GptNeoxLayer(nn.Module):
    """Attention and MLP, both from the layer's input if parallel, else one after the other."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        self.num_heads = shape.num_attention_heads
        self.is_parallel = shape.parallel_residual
        h, d, f = _widths(shape)
        self.input_layernorm = nn.LayerNorm(h, shape.norm_epsilon)
        self.post_attention_layernorm = nn.LayerNorm(h, shape.norm_epsilon)
        self.attention = nn.ModuleDict(
            {
                "query_key_value": nn.Linear(h, 3 * self.num_heads * d),
                "dense": nn.Linear(self.num_heads * d, h),
            }
        )
        self.mlp = nn.ModuleDict(
            {"dense_h_to_4h": nn.Linear(h, f), "dense_4h_to_h": nn.Linear(f, h)}
        )

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        """[b, slots, h] -> [b, slots, h]."""
        attention = self._attention(self.input_layernorm(x), rotary)
        mlp_input = x if self.is_parallel else x + attention
        y = self.mlp["dense_h_to_4h"](self.post_attention_layernorm(mlp_input))
        return x + attention + self.mlp["dense_4h_to_h"](F.gelu(y))

    def _attention(self, x: Tensor, rotary: Rotary) -> Tensor:
        # Query, key and value of one head lie together: [b, heads, slots, 3 * d].
        fused = split_heads(self.attention["query_key_value"](x), self.num_heads)
        query, key, value = fused.chunk(3, dim=-1)
        return self.attention["dense"](attend(rotate(query, rotary), rotate(key, rotary), value))


class Gpt2(ReferenceModel):
    """LayerNorm, learned positions, GELU by tanh, biases, head tied to the embedding."""

    token_embedding = "transformer.wte"
    layers = "transformer.h"
    final_norm = "transformer.ln_f"
    head = "transformer.wte"

    def __init__(self, shape: ModelConfig, method: MethodConfig) -> None:
        super().__init__(shape, method)
        v, h = _vocabulary(shape)
        assert shape.max_position_embeddings is not None
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(v, h)
        self.transformer.wpe = nn.Embedding(shape.max_position_embeddings, h)
        self.transformer.h = nn.ModuleList(Gpt2Layer(shape) for _ in range(shape.num_layers))
        self.transformer.ln_f = nn.LayerNorm(h, shape.norm_epsilon)

    def run_layers(self, slots: Tensor, positions: Tensor) -> Tensor:
        """As the base class, with learned positions added to every slot instead of rotary ones."""
        slots = slots + self.get_submodule("transformer.wpe")(positions)
        for layer in self.get_submodule(self.layers).children():
            slots = layer(slots)
        return slots


class Gpt2Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: ModelConfig) -> None:
        super().__init__()
        self.num_heads = shape.num_attention_heads
        h, d, f = _widths(shape)
        width = self.num_heads * d
        self.ln_1 = nn.LayerNorm(h, shape.norm_epsilon)
        self.ln_2 = nn.LayerNorm(h, shape.norm_epsilon)
        self.attn = nn.ModuleDict(
            {"c_attn": TransposedLinear(h, 3 * width), "c_proj": TransposedLinear(width, h)}
        )
        self.mlp = nn.ModuleDict({"c_fc": TransposedLinear(h, f), "c_proj": TransposedLinear(f, h)})

    def forward(self, x: Tensor) -> Tensor:
        """[b, slots, h] -> [b, slots, h]."""
        fused = self.attn["c_attn"](self.ln_1(x))
        query, key, value = (split_heads(part, self.num_heads) for part in fused.chunk(3, dim=-1))
        x = x + self.attn["c_proj"](attend(query, key, value))
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](F.gelu(y, approximate="tanh"))


class TransposedLinear(nn.Module):
    """A linear layer that keeps its weight as [in, out], as OpenAI's GPT-2 does."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(in_features, out_features).normal_(std=0.02))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(x, self.weight.t(), self.bias)


def _vocabulary(shape: ModelConfig) -> tuple[int, int]:
    """Rows and width of embedding and head."""
    assert shape.vocab_size is not None
    return shape.vocab_size, shape.hidden_size


def _widths(shape: ModelConfig) -> tuple[int, int, int]:
    """Widths of the residual stream, of a head and of the MLP."""
    assert shape.kv_channels is not None and shape.ffn_hidden_size is not None
    return shape.hidden_size, shape.kv_channels, shape.ffn_hidden_size


IS_THINKING = {"vanilla": False, "ponderlm2": True}
"""The methods that there are, and which of them put thoughts before a token."""

ARCHITECTURES: dict[str, type[ReferenceModel]] = {
    "llama": Llama,
    "gpt_neox": GptNeox,
    "gpt2": Gpt2,
}

_LAYER_NORM_AND_BIASES = {"normalization": "LayerNorm", "add_bias_linear": True}
STOCK_SETTINGS: dict[str, dict[str, object]] = {
    "llama": {
        "normalization": "RMSNorm",
        "activation": "swiglu",
        "add_bias_linear": False,
        "parallel_residual": False,
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": True,
    },
    "gpt_neox": _LAYER_NORM_AND_BIASES
    | {
        "activation": "gelu",
        "position_embedding_type": "rope",
        "untie_embeddings_and_output_weights": True,
    },
    "gpt2": _LAYER_NORM_AND_BIASES
    | {
        "activation": "gelu_tanh",
        "parallel_residual": False,
        "position_embedding_type": "learned_absolute",
        "untie_embeddings_and_output_weights": False,
    },
}
"""Settings without which an architecture is not the stock one."""
