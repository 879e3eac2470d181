"""The same models and methods in plain PyTorch, in one process.

An oracle for shapes that have no golden case. It shares no code with `ponder/` and `model/`:
attention, positions, passes and loss are written a second time, batch first, here, in `layers` (one
module per architecture) and in `methods`. Parameters have the names of Hugging Face transformers,
so that stock weights load with `load_state_dict`.

Left out: parallelism, dropout, padding of the vocabulary, caches, and every combination of settings
that the three stock architectures do not have. Mixed precision is `torch.autocast`, the caller's.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_ponder.config.resolved import ResolvedConfig, ResolvedModelConfig
from megatron_ponder.config.schema import MethodConfig
from megatron_ponder.errors import ConfigError
from tests.reference.layers import (
    Gpt2Layer,
    GptNeoxLayer,
    LlamaLayer,
    rotary_table,
)
from tests.reference.methods import METHODS, embedding_scale


def build_reference(config: ResolvedConfig) -> "ReferenceModel":
    """The plain model of a resolved run, with torch's default initial weights.

    Raises:
        ConfigError: settings that the reference does not have.
    """
    shape, method = config.model, config.method
    if shape.architecture not in ARCHITECTURES:
        raise ConfigError(
            f"--architecture {shape.architecture}: the plain PyTorch reference has "
            f"{', '.join(ARCHITECTURES)} only."
        )
    required = NOT_IN_REFERENCE | STOCK_SETTINGS[shape.architecture]
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
    if method.method not in METHODS:
        known = ", ".join(METHODS)
        problems.append(f"--method {method.method}: the plain PyTorch reference has {known} only.")
    if problems:
        raise ConfigError("\n".join(problems))
    return architecture(shape, method)


class ReferenceModel(nn.Module):
    """A language model that may think before each token.

    Subclasses build the modules and say where they are; the thinking is in `reference_methods`.
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

    def __init__(self, shape: ResolvedModelConfig, method: MethodConfig) -> None:
        super().__init__()
        self.shape = shape
        self.method = method
        self.num_thoughts = THOUGHTS_OF.get(method.method, method.num_latent_thoughts)
        self.has_scaled_embeddings = True

    def forward(self, tokens: Tensor, num_jacobi_iterations: int) -> Tensor:
        """Logits of the next token at every token.

        Args:
            tokens: int64 [b, s].
            num_jacobi_iterations: R.

        Returns:
            [b, s, v].
        """
        return self.logits_of(METHODS[self.method.method](self, tokens, num_jacobi_iterations))

    def logits_of(self, hidden: Tensor) -> Tensor:
        """The output layer, [..., h] -> [..., v]."""
        return F.linear(hidden, self.get_submodule(self.head).get_parameter("weight"))

    def norm(self, hidden: Tensor) -> Tensor:
        """The norm behind the last layer."""
        return self.get_submodule(self.final_norm)(hidden)

    def embed(self, tokens: Tensor) -> Tensor:
        """[b, s] -> [b, s, h], scaled where the method says so."""
        return self._scaled(self.get_submodule(self.token_embedding)(tokens))

    def table(self) -> Tensor:
        """All token embeddings, [v, h], scaled where the method says so."""
        return self._scaled(self.get_submodule(self.token_embedding).get_parameter("weight"))

    def think(self, stages: Tensor, kept: slice) -> Tensor:
        """Run the layers over all stages: [b, s, n, h] -> the kept stages, normed, [b, s, m, h]."""
        b, s, n, h = stages.shape
        positions = torch.arange(s, device=stages.device).repeat_interleave(n)
        # [b, s, n, h] -> [b, s*n, h] and back
        hidden = self.run_layers(stages.reshape(b, s * n, h), positions)
        return self.norm(hidden.view(b, s, n, h)[:, :, kept])

    def run_layers(self, slots: Tensor, positions: Tensor, has_positions: bool = False) -> Tensor:
        """All layers, causally over slots [b, slots, h] at the given positions [slots].

        `has_positions` says that learned positions were added before.
        """
        rotary = rotary_table(self.shape, positions)
        for layer in self.get_submodule(self.layers).children():
            slots = layer(slots, rotary)
        return slots

    def _scaled(self, embeddings: Tensor) -> Tensor:
        """Times the method's factor, in the embeddings' dtype."""
        scale = embedding_scale(self.method, self.shape.hidden_size)
        if scale is None or not self.has_scaled_embeddings:
            return embeddings
        return embeddings * torch.tensor(scale, dtype=embeddings.dtype).item()


def loss_function(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of logits [b, s, v] and the token after each, int64 [b, s]."""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


class Llama(ReferenceModel):
    """RMSNorm, rotary positions, gated MLP, grouped queries, no biases."""

    token_embedding = "model.embed_tokens"
    layers = "model.layers"
    final_norm = "model.norm"
    head = "lm_head"
    has_query_groups = True

    def __init__(self, shape: ResolvedModelConfig, method: MethodConfig) -> None:
        super().__init__(shape, method)
        v, h = _vocabulary(shape)
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(v, h)
        self.model.layers = nn.ModuleList(LlamaLayer(shape) for _ in range(shape.num_layers))
        self.model.norm = nn.RMSNorm(h, shape.norm_epsilon)
        self.lm_head = nn.Linear(h, v, bias=False)


class GptNeox(ReferenceModel):
    """LayerNorm, partly rotary positions, exact GELU, biases, parallel or sequential residual."""

    token_embedding = "gpt_neox.embed_in"
    layers = "gpt_neox.layers"
    final_norm = "gpt_neox.final_layer_norm"
    head = "embed_out"

    def __init__(self, shape: ResolvedModelConfig, method: MethodConfig) -> None:
        super().__init__(shape, method)
        v, h = _vocabulary(shape)
        self.gpt_neox = nn.Module()
        self.gpt_neox.embed_in = nn.Embedding(v, h)
        self.gpt_neox.layers = nn.ModuleList(GptNeoxLayer(shape) for _ in range(shape.num_layers))
        self.gpt_neox.final_layer_norm = nn.LayerNorm(h, shape.norm_epsilon)
        self.embed_out = nn.Linear(h, v, bias=False)


class Gpt2(ReferenceModel):
    """LayerNorm, learned positions, GELU by tanh, biases, head tied to the embedding."""

    token_embedding = "transformer.wte"
    layers = "transformer.h"
    final_norm = "transformer.ln_f"
    head = "transformer.wte"

    def __init__(self, shape: ResolvedModelConfig, method: MethodConfig) -> None:
        super().__init__(shape, method)
        v, h = _vocabulary(shape)
        self.transformer = nn.Module()
        self.transformer.wte = nn.Embedding(v, h)
        self.transformer.wpe = nn.Embedding(shape.max_position_embeddings, h)
        self.transformer.h = nn.ModuleList(Gpt2Layer(shape) for _ in range(shape.num_layers))
        self.transformer.ln_f = nn.LayerNorm(h, shape.norm_epsilon)

    def run_layers(self, slots: Tensor, positions: Tensor, has_positions: bool = False) -> Tensor:
        """As the base class, with learned positions added to every slot instead of rotary ones."""
        if not has_positions:
            slots = slots + self.get_submodule("transformer.wpe")(positions)
        for layer in self.get_submodule(self.layers).children():
            slots = layer(slots)
        return slots


def _vocabulary(shape: ResolvedModelConfig) -> tuple[int, int]:
    """Rows and width of embedding and head."""
    return shape.vocab_size, shape.hidden_size


THOUGHTS_OF = {"vanilla": 0}
"""Methods whose number of thoughts no setting changes."""

ARCHITECTURES: dict[str, type[ReferenceModel]] = {
    "llama": Llama,
    "gpt_neox": GptNeox,
    "gpt2": Gpt2,
}

NOT_IN_REFERENCE: dict[str, object] = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "add_qkv_bias": False,
    "add_attention_bias": False,
    "qk_layernorm": False,
    "use_rope_scaling": False,
    "rotary_seq_len_interpolation_factor": None,
}
"""Settings that are off in every architecture here."""

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
