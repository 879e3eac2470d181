"""Layers of the plain PyTorch reference: Llama's, GPT-NeoX's and GPT-2's, batch first.

Parameter names are those of Hugging Face transformers. Left out: what `benchmark.reference` leaves
out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ponder.config.resolved import ResolvedModelConfig

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines [slots, d_rotated] of a sequence's positions."""


def rotary_table(shape: ResolvedModelConfig, positions: Tensor) -> Rotary:
    """Cosines and sines of position x base^(-2i/d), for the d channels that are rotated."""
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


class LlamaLayer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: ResolvedModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_groups = shape.num_attention_heads, shape.num_query_groups
        h, d, f = widths(shape)
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


class GptNeoxLayer(nn.Module):
    """Attention and MLP, both from the layer's input if parallel, else one after the other."""

    def __init__(self, shape: ResolvedModelConfig) -> None:
        super().__init__()
        self.num_heads = shape.num_attention_heads
        self.is_parallel = shape.parallel_residual
        h, d, f = widths(shape)
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


class Gpt2Layer(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, shape: ResolvedModelConfig) -> None:
        super().__init__()
        self.num_heads = shape.num_attention_heads
        h, d, f = widths(shape)
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


def widths(shape: ResolvedModelConfig) -> tuple[int, int, int]:
    """Widths of the residual stream, of a head and of the MLP."""
    return shape.hidden_size, shape.kv_channels, shape.ffn_hidden_size
