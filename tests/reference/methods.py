"""The methods once more, in plain PyTorch, for the reference: tokens in, last hidden states out.

Each is a function of a reference model, token ids [b, s] and R, and gives the final-normed hidden
states [b, s, h] that the output layer reads. `ponder/methods` has no part in it.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.config.schema import MethodConfig


class Runs(Protocol):
    """What a method needs of a model."""

    method: MethodConfig
    num_thoughts: int
    has_scaled_embeddings: bool

    def embed(self, tokens: Tensor) -> Tensor:
        """[b, s] -> [b, s, h], scaled where the method says so."""

    def think(self, stages: Tensor, kept: slice) -> Tensor:
        """All layers over [b, s, n, h] -> the kept stages, normed, [b, s, m, h]."""

    def run_layers(self, slots: Tensor, positions: Tensor, has_positions: bool = False) -> Tensor:
        """All layers over [b, slots, h]; learned positions are added unless they are there."""

    def norm(self, hidden: Tensor) -> Tensor:
        """The final norm."""

    def logits_of(self, hidden: Tensor) -> Tensor:
        """[..., h] -> [..., v]."""

    def table(self) -> Tensor:
        """Token embeddings [v, h], scaled where the method says so."""


def thoughts(model: Runs, tokens: Tensor, num_jacobi_iterations: int) -> Tensor:
    """ponderlm2, and vanilla with no thoughts."""
    k = model.num_thoughts

    def feed_back(hidden: Tensor) -> Tensor:
        return mixture(model, hidden) if model.method.interpolation else hidden

    # Dim 2 is the stage: 0 the token itself, j its j-th thought.
    embeddings = model.embed(tokens).unsqueeze(2)  # [b, s, h] -> [b, s, 1, h]
    stages = embeddings
    for _ in range(k):
        stages = torch.cat((embeddings, feed_back(model.think(stages, slice(None)))), dim=2)
    for _ in range(num_jacobi_iterations if k else 0):
        stages = torch.cat((embeddings, feed_back(model.think(stages, slice(0, k)))), dim=2)
    return model.think(stages, slice(k, k + 1)).squeeze(2)  # [b, s, 1, h] -> [b, s, h]


def ponder(model: Runs, tokens: Tensor, num_jacobi_iterations: int) -> Tensor:
    """Ponderlm in its three forms."""
    is_hidden = model.method.ponderlm_feedback == "hidden"
    is_accumulating = is_hidden or model.method.residual_interpolated_embeds
    embeddings = following = model.embed(tokens).unsqueeze(2)
    for _ in range(model.num_thoughts):
        hidden = model.think(following, slice(None))
        added = hidden if is_hidden else mixture(model, hidden)
        following = (following if is_accumulating else embeddings) + added
    return model.think(following, slice(None)).squeeze(2)


def loop(model: Runs, tokens: Tensor, num_jacobi_iterations: int) -> Tensor:
    """The layers over and over, normed once."""
    positions = torch.arange(tokens.size(1), device=tokens.device)
    stream = model.run_layers(model.embed(tokens), positions)
    for _ in range(model.num_thoughts):
        stream = model.run_layers(stream, positions, has_positions=True)
    return model.norm(stream)


def pause(model: Runs, tokens: Tensor, num_jacobi_iterations: int) -> Tensor:
    """K pause tokens behind each token."""
    k, pause_id = model.num_thoughts, model.method.pause_token_id
    assert pause_id is not None
    pauses = model.embed(torch.full_like(tokens, pause_id)).unsqueeze(2)
    stages = torch.cat((model.embed(tokens).unsqueeze(2), *[pauses] * k), dim=2)
    return model.think(stages, slice(k, k + 1)).squeeze(2)


def mixture(model: Runs, hidden: Tensor) -> Tensor:
    """Embeddings weighted by the probabilities of the next token, or of the likeliest ones."""
    logits = model.logits_of(hidden)
    if not model.method.interpolation_use_topk:
        return torch.softmax(logits, dim=-1) @ model.table()
    best = logits.topk(min(model.method.interpolation_topk, logits.size(-1)), dim=-1)
    chosen = F.embedding(best.indices, model.table())  # [..., k, h]
    return (torch.softmax(best.values, dim=-1).unsqueeze(-1) * chosen).sum(dim=-2)


METHODS: dict[str, Callable[[Runs, Tensor, int], Tensor]] = {
    "vanilla": thoughts,
    "ponderlm2": thoughts,
    "ponderlm": ponder,
    "loop": loop,
    "pause": pause,
}


def embedding_scale(method: MethodConfig, hidden_size: int) -> float | None:
    """The factor on embeddings before it is rounded; None: 1."""
    large, small = math.sqrt(2.5 * hidden_size), math.sqrt(hidden_size)
    is_scaled = method.scale_embeds
    return {
        "vanilla": None,
        "ponderlm2": (small if method.interpolation else large) if is_scaled else None,
        "ponderlm": small if is_scaled and method.ponderlm_feedback == "mixture" else None,
        "loop": large,
        "pause": small if is_scaled or method.pause_always_scales else None,
    }[method.method]
