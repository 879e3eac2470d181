"""The pass plan: the passes of one forward, as plain data.

A plan is a pure function of (method, K, R). All parts of the code that must agree about a forward
use it: the model, which runs it; the pipeline, which sends tensors of known shapes between passes;
and the FLOP and memory accounting. It holds no tensors and does not depend on the architecture.
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
    """Whether its carry is a mixture of embeddings, which costs two matmuls with the vocabulary."""
    carries_input: bool = False
    """Whether the carry needs the pass's input, which is then sent along with hidden states."""

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
    """All passes of one forward, in order. The loss uses the output of the last."""

    passes: tuple[Pass, ...]
    first_grad_pass: int = 0
    """Passes before this one run without a gradient (--jacobi-grad-passes); 0: all have one."""

    def __post_init__(self) -> None:
        """Check the invariants that all users of a plan rely on."""
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
        """Sum of slots per token over all passes: linear-layer work in vanilla forwards.

        For ponderlm2 it is K(K+1)/2 + (K+1)(R+1).
        """
        return sum(p.slots_per_token for p in self.passes)

    @property
    def mixes_embeddings(self) -> bool:
        """Whether any pass mixes, which needs the embedding table on the output layer's rank."""
        return any(p.mixes_embeddings for p in self.passes)

    def is_last(self, pass_: Pass) -> bool:
        """Whether this is the pass that gives the loss."""
        return pass_.index == len(self.passes) - 1

    def has_grad(self, pass_: Pass) -> bool:
        """Whether the backward includes this pass."""
        return pass_.index >= self.first_grad_pass

    def is_recomputed(self, pass_: Pass, training: ResolvedTrainingConfig) -> bool:
        """Whether the backward recomputes this whole pass (--recompute-granularity pass).

        The first passes with a gradient are recomputed. The last pass never is: the backward starts
        with it, so dropping its activations would not reduce the peak memory.
        """
        is_by_pass = training.recompute_granularity == "pass"
        if not is_by_pass or self.is_last(pass_) or not self.has_grad(pass_):
            return False
        num_passes = training.recompute_num_passes
        return num_passes is None or pass_.index - self.first_grad_pass < num_passes

    def with_grad_passes(self, num_passes: int | None) -> "PassPlan":
        """The same passes, with a gradient in the last `num_passes` only; None: in all."""
        first = 0 if num_passes is None else max(0, len(self.passes) - num_passes)
        return dataclasses.replace(self, first_grad_pass=first)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingPlan:
    """The passes of one new token in generation, and the caches that they use.

    A cache holds the keys and values of earlier slots, per layer. The prompt runs all passes of its
    own plan. Then each new token runs `plan`; every pass attends to a cache and appends its slots.
    """

    plan: PassPlan
    """The passes of a new token; the last gives its logits."""
    shares_cache: bool = False
    """Whether all passes of a new token append to one cache, that of the prompt's last pass.
    Otherwise there is one cache per pass, and pass i of a new token uses that of prompt pass i."""
