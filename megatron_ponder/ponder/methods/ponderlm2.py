"""ponderlm2: K latent thoughts before each token, trained in parallel by Jacobi iterations.

PonderLM-2 (arXiv 2509.23184). Stage 0 holds the tokens, stage j = 1..K the j-th thought, which is
the final-normed hidden state at stage j-1 of the same token, fed back as it is. K growth passes
create the stages one by one, R Jacobi passes refresh all of them at once, and the loss pass reads
the next token at stage K:

    pass i < K:        i+1 stages in;  z_{j+1} <- hidden_j for j = 0..i
    pass K..K+R-1:     K+1 stages in;  z_{j+1} <- hidden_j for j = 0..K-1, simultaneously
    pass K+R:          K+1 stages in;  logits from hidden_K

Linear work in vanilla forwards: K(K+1)/2 + (K+1)(R+1).

Generated tokens need no iterations: the thoughts before them are there, so each thought is computed
when its turn comes, K+1 passes over one slot each, all into one cache:

    pass i <= K:       1 slot in, the token or z_i;  z_{i+1} <- hidden;  logits from hidden_K

With `interpolation` a thought is, instead of the hidden state, the mixture of scaled embeddings by
the probabilities that the hidden state gives to next tokens.
"""

import math

from torch import Tensor

from megatron_ponder.kernels.interleave import interleave
from megatron_ponder.ponder.method import Method, Mix
from megatron_ponder.ponder.plan import DecodingPlan, Pass, PassPlan


class PonderLM2(Method):
    """Latent thoughts as extra slots of the sequence; adds no parameters."""

    def plan(self, num_jacobi_iterations: int) -> PassPlan:
        """K growth passes, R Jacobi passes, the loss pass; with K = 0 only the last, whatever R."""
        k = self.config.num_latent_thoughts
        r = num_jacobi_iterations if k > 0 else 0
        growth = [(i + 1, range(i + 1)) for i in range(k)]
        jacobi = [(k + 1, range(k))] * r
        loss = [(k + 1, range(k, k + 1))]
        return PassPlan(
            passes=tuple(
                Pass(
                    index=index,
                    slots_per_token=slots_per_token,
                    output_slots=output_slots,
                    mixes_embeddings=self.config.interpolation and index < k + r,
                )
                for index, (slots_per_token, output_slots) in enumerate(growth + jacobi + loss)
            )
        )

    def embedding_scale(self, hidden_size: int) -> float | None:
        """sqrt(2.5 h), so that embeddings under small initialisation have unit variance.

        sqrt(h) with `interpolation`, as in the authors' code.
        """
        if not self.config.scale_embeds:
            return None
        return math.sqrt(hidden_size if self.config.interpolation else 2.5 * hidden_size)

    def build_input(self, pass_: Pass, token_embeddings: Tensor, carry: Tensor | None) -> Tensor:
        """Each token's embedding, then the thoughts handed on by the previous pass."""
        return interleave(token_embeddings, carry)

    def build_carry(
        self, pass_: Pass, outputs: Tensor, mix: Mix, pass_input: Tensor | None
    ) -> Tensor:
        """The next thoughts: hidden states, or mixtures."""
        return mix(outputs) if pass_.mixes_embeddings else outputs

    def decoding_plan(self, plan: PassPlan) -> DecodingPlan:
        """The slots of a token one by one, behind all those of the tokens before."""
        k = self.config.num_latent_thoughts
        passes = tuple(
            Pass(
                index=index,
                slots_per_token=1,
                output_slots=range(1),
                embeds_tokens=index == 0,
                mixes_embeddings=self.config.interpolation and index < k,
            )
            for index in range(k + 1)
        )
        return DecodingPlan(plan=PassPlan(passes=passes), shares_cache=True)

    def build_decoding_input(
        self, pass_: Pass, token_embeddings: Tensor, carry: Tensor | None
    ) -> Tensor:
        """The token's embedding, then the thought before."""
        return token_embeddings if carry is None else carry
