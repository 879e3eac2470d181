"""Texts that grow token by token, and the logits behind their last tokens.

`cached` keeps keys and values: a prompt runs the method's passes once, as in training, and a new
token runs what the method's `decoding_plan` says, over its own slots. `recomputed` runs the whole
training forward over the whole text for every token: the slow definition of what a forward is.

For methods without iterations both are the same computation. For ponderlm2 they are the same in the
limit of many iterations: `cached` leaves the prompt's thoughts as its R rounds made them and
computes all later thoughts one after the other, exactly; `recomputed` gives every thought R rounds,
those of new tokens included. docs/generate.md measures the difference.

Texts of one batch may differ in length. They begin together, with padding behind the shorter ones,
which under causal attention no token sees. Left out: choosing tokens (sampling.py).
"""

import abc
import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from megatron_ponder.inference.logits import whole_logits
from megatron_ponder.model.cache import KeyValueCache, NewTokens
from megatron_ponder.model.ponder_gpt_model import PonderGPTModel
from megatron_ponder.ponder.plan import PassPlan
from megatron_ponder.runtime.device import device

ROTARY_BLOCK = 1024
"""Positions that a table of cosines and sines grows by."""


class Continuation(abc.ABC):
    """Texts that grow."""

    @abc.abstractmethod
    def begin(self, prompts: Sequence[Tensor]) -> Tensor:
        """Read the prompts.

        Args:
            prompts: int64 [s] each, s >= 1 of its own.

        Returns:
            Logits behind each prompt, fp32 [b, v].
        """

    @abc.abstractmethod
    def add(self, tokens: Sequence[int]) -> Tensor:
        """Put one token behind each text; the logits behind them, fp32 [b, v]."""

    @abc.abstractmethod
    def keep_rows(self, rows: Sequence[int]) -> None:
        """Go on with these texts only, in this order."""


@contextlib.contextmanager
def continuation(
    model: PonderGPTModel, plan: PassPlan, *, use_cache: bool = True
) -> Iterator[Continuation]:
    """Texts for a model in evaluation mode, without pipeline, context or sequence parallelism.

    Args:
        model: this rank's.
        plan: the passes of a whole text.
        use_cache: whether to keep keys and values.
    """
    if not use_cache:
        yield _Recomputed(model, plan)
        return
    attentions = [layer.self_attention.core_attention for layer in model.decoder.layers]
    with KeyValueCache().attached(attentions) as cache:
        yield _Cached(model, plan, cache)


class _Recomputed(Continuation):
    """Nothing is kept but the texts."""

    def __init__(self, model: PonderGPTModel, plan: PassPlan) -> None:
        self._model = model
        self._plan = plan
        self._texts: list[Tensor] = []

    @torch.no_grad()
    def begin(self, prompts: Sequence[Tensor]) -> Tensor:
        """See Continuation."""
        self._texts = list(prompts)
        return self._logits()

    @torch.no_grad()
    def add(self, tokens: Sequence[int]) -> Tensor:
        """See Continuation."""
        self._texts = [
            torch.cat((text, text.new_tensor([token])))
            for text, token in zip(self._texts, tokens, strict=True)
        ]
        return self._logits()

    def keep_rows(self, rows: Sequence[int]) -> None:
        """See Continuation."""
        self._texts = [self._texts[row] for row in rows]

    def _logits(self) -> Tensor:
        outputs = self._model.run_passes(_padded(self._texts), self._plan)
        return _logits_at_ends(self._model, outputs, [len(text) for text in self._texts])


class _Cached(Continuation):
    """Keys and values are kept."""

    def __init__(self, model: PonderGPTModel, plan: PassPlan, cache: KeyValueCache) -> None:
        self._model = model
        self._plan = plan
        self._decoding = model.method.decoding_plan(plan)
        self._cache = cache
        self._lengths: list[int] = []
        self._rotary = torch.empty(0)

    @torch.no_grad()
    def begin(self, prompts: Sequence[Tensor]) -> Tensor:
        """See Continuation."""
        tokens = _padded(prompts)
        self._lengths = [len(prompt) for prompt in prompts]
        embeddings = self._model.embed(tokens)
        carry: Tensor | None = None
        for pass_ in self._plan.passes:
            num_slots = tokens.size(1) * pass_.slots_per_token
            if not self._decoding.shares_cache:
                self._cache.keep_prompt(pass_.index, num_slots)
            elif self._plan.is_last(pass_):
                self._cache.keep_prompt(0, num_slots)
            else:
                self._cache.keep_nothing()
            carry = self._model.run_pass(pass_, self._plan, embeddings, carry)
        assert carry is not None
        return _logits_at_ends(self._model, carry, self._lengths)

    @torch.no_grad()
    def add(self, tokens: Sequence[int]) -> Tensor:
        """See Continuation."""
        at = self._places()
        embeddings = self._model.embed(torch.tensor(tokens, device=device())[:, None])
        carry: Tensor | None = None
        plan, num_earlier = self._decoding.plan, 0
        for pass_ in plan.passes:
            shares = self._decoding.shares_cache
            slots = self._plan.passes[-1].slots_per_token if shares else pass_.slots_per_token
            starts = [length * slots + num_earlier * shares for length in self._lengths]
            cache = 0 if shares else pass_.index
            self._cache.add(cache, starts, pass_.slots_per_token, device())
            carry = self._model.decode_pass(pass_, plan, embeddings, carry, at)
            num_earlier += pass_.slots_per_token
        assert carry is not None
        self._lengths = [length + 1 for length in self._lengths]
        return whole_logits(self._model, carry)[:, 0]

    def keep_rows(self, rows: Sequence[int]) -> None:
        """See Continuation."""
        self._lengths = [self._lengths[row] for row in rows]
        self._cache.keep_rows(rows)

    def _places(self) -> NewTokens:
        """Where the next tokens are: each behind its row's last."""
        positions = torch.tensor(self._lengths, device=device())
        rotary = None
        if self._model.rotary_pos_emb is not None:
            num_positions = max(self._lengths) + 1
            if self._rotary.numel() == 0 or self._rotary.size(1) < num_positions:
                capacity = -(-num_positions // ROTARY_BLOCK) * ROTARY_BLOCK
                self._rotary = self._model.rotary_of(capacity, 1, self._model.config.params_dtype)
            # [2, positions, 1, 1, r] -> [2, b, 1, 1, r] -> [2, 1, b, 1, r]
            rotary = self._rotary[:, positions].transpose(1, 2)
        return NewTokens(positions=positions, rotary=rotary)


def _padded(texts: Sequence[Tensor]) -> Tensor:
    """The texts as rows [b, s], shorter ones with something behind them."""
    return torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True).to(device())


def _logits_at_ends(model: PonderGPTModel, outputs: Tensor, lengths: Sequence[int]) -> Tensor:
    """Logits at the last token of each row: [s, b, h] -> fp32 [b, v]."""
    last = torch.tensor(lengths, device=outputs.device) - 1
    rows = torch.arange(len(lengths), device=outputs.device)
    return whole_logits(model, outputs[last, rows][None])[:, 0]
