"""The methods: the passes through the layers that make up a forward, and the input of each.

    ponderlm2   K thoughts after every token, each the normed hidden state at the slot before it: K
                growth passes create them, R Jacobi passes refresh all of them at once, and one more
                pass gives the logits. With `interpolation` a thought is a mixture of embeddings.
    ponderlm    K passes, each followed by adding its prediction (a mixture of embeddings) to the
                token embeddings (with `hidden` its hidden state, to its own input); one more pass
                gives the logits.
    loop        the layers K+1 times in a row; the norm once, at the end, and learned positions
                once, at the start.
    pause       K pause tokens after every token, one pass.
    vanilla     one pass.

The slots of a token lie together and share its position; its last slot gives the logits. With a
cache all methods but ponderlm2 compute the same numbers as without. ponderlm2 keeps the thoughts of
a prompt (or of a part of it) after R rounds, and later tokens attend to those; a single new token
is computed slot by slot, exactly.

Shapes: b batch, s new tokens, n slots per token, h hidden, v vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .stock_model import StockModel
from .thought_cache import ThoughtCache


@dataclasses.dataclass(kw_only=True)
class Output:
    """What a method computed."""

    hidden: Tensor
    """[b, s, h]: what the head reads."""
    last_pass: Any
    """The stock output of the last pass."""
    num_rounds: int | None = None
    """Jacobi rounds; None: there was nothing to refresh."""


@dataclasses.dataclass(kw_only=True)
class Passes:
    """One forward's inputs, and how to run a pass over them."""

    config: Any
    """The model's configuration."""
    model: StockModel
    tokens: Tensor
    """Scaled embeddings of the new tokens, [b, s, h]."""
    mask: Tensor
    """Which tokens are padding, as zeros: [b, tokens in the cache + s]."""
    position_ids: Tensor
    """[b, s]."""
    embed: Callable[[Tensor], Tensor]
    """From ids to scaled embeddings."""
    mix: Callable[[Tensor], Tensor]
    """From normed hidden states to mixtures of scaled embeddings: [..., h] -> [..., h]."""
    cache: ThoughtCache | None
    """Earlier tokens, if any, and where to keep the new ones."""
    keeps: bool
    """Whether the new ones are kept in it."""
    num_jacobi_iterations: int
    """R; the most rounds, with a tolerance."""
    jacobi_tolerance: float | None
    """Stop when no thought changes by more than this share of its norm; None: never."""
    wanted: dict[str, bool]
    """What the last pass shall return beside the last hidden states."""

    @property
    def num_seen(self) -> int:
        """Tokens in the cache."""
        return 0 if self.cache is None else self.cache.num_tokens

    def run(
        self,
        slots: Tensor,
        slots_per_token: int,
        *,
        index: int = 0,
        keeps: bool = False,
        is_last: bool = False,
        applies_norm: bool = True,
        adds_positions: bool = True,
    ) -> Any:
        """One pass.

        Args:
            slots: [b, s * m, h], the last m of each new token's slots.
            slots_per_token: how many slots each new token has by now, those in the cache included.
            index: of the cache that has the keys and values to see.
            keeps: whether the new ones are kept, if any are.
            is_last: whether it returns all that the caller wants.
            applies_norm: whether the final norm follows the layers.
            adds_positions: whether learned positions are added.
        """
        cache: Any = None
        if self.cache is not None and keeps and self.keeps:
            cache = self.cache.caches[index]
        elif self.cache is not None and self.num_seen:
            cache = self.cache.view(index)
        seen = self.mask[:, : self.num_seen].repeat_interleave(self.config.slots_per_token, dim=1)
        new = self.mask[:, self.num_seen :].repeat_interleave(slots_per_token, dim=1)
        slots_per_token = slots.size(1) // self.tokens.size(1)
        return self.model.run(
            slots.to(self.tokens.device),
            position_ids=self.position_ids.repeat_interleave(slots_per_token, dim=1),
            mask=torch.cat((seen, new), dim=1),
            cache=cache,
            applies_norm=applies_norm,
            adds_positions=adds_positions,
            **(self.wanted if is_last else {}),
        )


def interleave(tokens: Tensor, thoughts: Tensor | None) -> Tensor:
    """Each token before its thoughts: [b, s, h] and [b, s, n-1, h] -> [b, s * n, h]."""
    if thoughts is None:
        return tokens
    return torch.cat((tokens.unsqueeze(2), thoughts.to(tokens.device)), dim=2).flatten(1, 2)


def vanilla(passes: Passes) -> Output:
    """One pass over the tokens."""
    last = passes.run(passes.tokens, 1, keeps=True, is_last=True)
    return Output(hidden=last.last_hidden_state, last_pass=last)


def ponderlm2(passes: Passes) -> Output:
    """Thoughts by Jacobi iterations, or slot by slot for a single token that is kept."""
    config, tokens = passes.config, passes.tokens
    k = config.num_latent_thoughts
    if passes.keeps and tokens.size(1) == 1:
        return _slot_by_slot(passes)

    def next_thoughts(thoughts: Tensor | None, slots_per_token: int, num_outputs: int) -> Tensor:
        hidden = passes.run(interleave(tokens, thoughts), slots_per_token).last_hidden_state
        # [b, s * n, h] -> [b, s, n, h] -> [b, s, outputs, h]
        outputs = hidden.unflatten(1, (-1, slots_per_token))[:, :, :num_outputs]
        return passes.mix(outputs) if config.mixes_embeddings else outputs

    thoughts: Tensor | None = None
    for i in range(k):
        thoughts = next_thoughts(thoughts, i + 1, i + 1)
    num_rounds = 0
    while thoughts is not None and num_rounds < passes.num_jacobi_iterations:
        before, thoughts = thoughts, next_thoughts(thoughts, k + 1, k)
        num_rounds += 1
        tolerance = passes.jacobi_tolerance
        if tolerance is not None and _largest_change(passes, before, thoughts) <= tolerance:
            break
    last = passes.run(interleave(tokens, thoughts), k + 1, keeps=True, is_last=True)
    hidden = last.last_hidden_state[:, k :: k + 1]
    return Output(hidden=hidden, last_pass=last, num_rounds=num_rounds)


def _slot_by_slot(passes: Passes) -> Output:
    """K+1 passes over one slot; the output of each is the input of the next."""
    config, slot = passes.config, passes.tokens
    for thought in range(config.num_latent_thoughts):
        slot = passes.run(slot, thought + 1, keeps=True).last_hidden_state
        slot = passes.mix(slot) if config.mixes_embeddings else slot
    last = passes.run(slot, config.slots_per_token, keeps=True, is_last=True)
    return Output(hidden=last.last_hidden_state, last_pass=last)


def _largest_change(passes: Passes, before: Tensor, after: Tensor) -> float:
    """The largest share of its norm by which a thought of a real token changed."""
    change = torch.linalg.vector_norm(after.float() - before.float(), dim=-1)
    share = change / torch.linalg.vector_norm(after.float(), dim=-1).clamp_min(1e-30)
    is_padding = passes.mask[:, passes.num_seen :, None].to(share.device) == 0
    return float(share.masked_fill(is_padding, 0.0).max())


def ponderlm(passes: Passes) -> Output:
    """Passes over the tokens, each fed with what the one before predicts."""
    config, tokens = passes.config, passes.tokens
    accumulates = config.residual_interpolated_embeds or not config.mixes_embeddings
    k = config.num_latent_thoughts
    slots = tokens
    for i in range(k):
        hidden = passes.run(slots, 1, index=i, keeps=True).last_hidden_state
        fed_back = passes.mix(hidden) if config.mixes_embeddings else hidden
        slots = (slots if accumulates else tokens) + fed_back.to(tokens.device)
    last = passes.run(slots, 1, index=k, keeps=True, is_last=True)
    return Output(hidden=last.last_hidden_state, last_pass=last)


def loop(passes: Passes) -> Output:
    """The layers again and again."""
    k = passes.config.num_latent_thoughts
    slots = passes.tokens
    for i in range(k):
        slots = passes.run(
            slots, 1, index=i, keeps=True, applies_norm=False, adds_positions=i == 0
        ).last_hidden_state
    last = passes.run(slots, 1, index=k, keeps=True, is_last=True, adds_positions=k == 0)
    return Output(hidden=last.last_hidden_state, last_pass=last)


def pause(passes: Passes) -> Output:
    """Pause tokens behind every token, and one pass."""
    config, tokens = passes.config, passes.tokens
    k = config.num_latent_thoughts
    ids = torch.full((k,), config.pause_token_id, dtype=torch.long, device=tokens.device)
    # [k, h] -> [b, s, k, h]
    pauses = passes.embed(ids).expand(*tokens.shape[:2], -1, -1)
    last = passes.run(interleave(tokens, pauses), k + 1, keeps=True, is_last=True)
    return Output(hidden=last.last_hidden_state[:, k :: k + 1], last_pass=last)


METHODS: dict[str, Callable[[Passes], Output]] = {
    "vanilla": vanilla,
    "ponderlm2": ponderlm2,
    "ponderlm": ponderlm,
    "loop": loop,
    "pause": pause,
}
