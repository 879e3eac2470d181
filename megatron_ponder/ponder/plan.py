"""The pass plan: which runs through the layers make up one forward, as plain data.

A plan is a pure function of (method, K, R). Everything that has to agree about a forward reads it:
the model that runs it, the pipeline that sends tensors of known shapes between its passes, the FLOP
and memory accounting. It holds no tensors and knows no architecture.
"""

import dataclasses

from megatron_ponder.config.resolved import ResolvedTrainingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pass:
    """One run through all layers.

    The input interleaves the slots of all tokens: position t * slots_per_token + j is slot j of
    token t. `output_slots` are the slots whose outputs are used: for the carry, or in the last pass
    for the logits. The last layer may skip all other slots.
    """

    index: int
    """Position in the plan, from 0."""
    slots_per_token: int
    """Slots per token in this pass's input."""
    output_slots: range
    """Slots of each token whose output hidden states are used."""
    final_norm: bool = True
    """Whether the final norm is applied to the outputs."""
    add_positions: bool = True
    """Whether learned positions are added to this pass's input (rotary ones always apply)."""
    embeds_tokens: bool = True
    """Whether its input contains the token embeddings; otherwise it is the carry alone."""
    mixes_embeddings: bool = False
    """Whether its carry is a mixture of embeddings, at two more matmuls with the vocabulary."""
    carries_input: bool = False
    """Whether the carry needs the pass's input, which is then sent beside the hidden states."""

    @property
    def outputs_per_token(self) -> int:
        """Slots per token in the output of this pass."""
        return len(self.output_slots)

    @property
    def sent_per_token(self) -> int:
        """Vectors per token sent from one pipeline stage to the next within the pass."""
        return self.slots_per_token * (2 if self.carries_input else 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PassPlan:
    """All passes of one forward, in order. The loss reads the output of the last."""

    passes: tuple[Pass, ...]
    first_grad_pass: int = 0
    """Passes before this one run without a gradient (--jacobi-grad-passes); 0: all have one."""

    def __post_init__(self) -> None:
        """Check what every reader of a plan relies on."""
        assert self.passes, "a plan has at least one pass"
        assert [p.index for p in self.passes] == list(range(len(self.passes)))
        assert 0 <= self.first_grad_pass < len(self.passes)
        for p in self.passes:
            assert len(p.output_slots) > 0 and p.output_slots.step == 1
            assert p.output_slots[-1] < p.slots_per_token, f"{p} uses a slot that it does not have"
        last = self.passes[-1]
        assert not last.mixes_embeddings and not last.carries_input, "the last pass has no carry"

    @property
    def max_slots_per_token(self) -> int:
        """Slots per token in the longest pass."""
        return max(p.slots_per_token for p in self.passes)

    @property
    def num_slot_passes(self) -> int:
        """Sum of slots per token over passes: linear-layer work in units of a vanilla forward.

        For ponderlm2 it is K(K+1)/2 + (K+1)(R+1).
        """
        return sum(p.slots_per_token for p in self.passes)

    @property
    def mixes_embeddings(self) -> bool:
        """Whether a pass needs the embedding table where the output layer is."""
        return any(p.mixes_embeddings for p in self.passes)

    def is_last(self, pass_: Pass) -> bool:
        """Whether the loss reads this pass."""
        return pass_.index == len(self.passes) - 1

    def has_grad(self, pass_: Pass) -> bool:
        """Whether the backward goes through this pass."""
        return pass_.index >= self.first_grad_pass

    def is_recomputed(self, pass_: Pass, training: ResolvedTrainingConfig) -> bool:
        """Whether the backward computes a whole pass again (--recompute-granularity pass).

        The first ones with a gradient are, and never the last: the backward begins with it, so
        dropping its activations would save nothing.
        """
        is_by_pass = training.recompute_granularity == "pass"
        if not is_by_pass or self.is_last(pass_) or not self.has_grad(pass_):
            return False
        num_passes = training.recompute_num_passes
        return num_passes is None or pass_.index - self.first_grad_pass < num_passes

    def with_grad_passes(self, num_passes: int | None) -> "PassPlan":
        """The same passes, of which the last `num_passes` have a gradient; None: all."""
        first = 0 if num_passes is None else max(0, len(self.passes) - num_passes)
        return dataclasses.replace(self, first_grad_pass=first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingPlan:
    """What one new token takes behind tokens whose keys and values are kept, and where.

    A cache holds the keys and values of earlier slots, per layer. The prompt runs all passes of its
    plan; then every new token runs `plan` by itself, each pass attending to a cache and adding its
    own slots to it.
    """

    plan: PassPlan
    """The passes of a new token; the last gives its logits."""
    shares_cache: bool = False
    """Whether there is one cache, that of the prompt's last pass, which a new token's passes fill
    up one after the other. Otherwise every pass has a cache of its own, the prompt's pass i and a
    new token's pass i the same."""
