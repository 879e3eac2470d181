"""ponderlm2: K latent thoughts before each token, trained in parallel by Jacobi iterations.

PonderLM-2 (arXiv 2509.23184). Slot 0 of a token holds the token, and slot j = 1..K its j-th
thought. The j-th thought is the final-normed hidden state at slot j-1 of the same token, fed back
unchanged. K growth passes add the slots one by one, R Jacobi passes refresh all thoughts at once,
and the loss pass predicts the next token at slot K:

    pass i < K:        i+1 slots in;  z_{j+1} <- hidden_j for j = 0..i
    pass K..K+R-1:     K+1 slots in;  z_{j+1} <- hidden_j for j = 0..K-1, simultaneously
    pass K+R:          K+1 slots in;  logits from hidden_K

Linear work in vanilla forwards: K(K+1)/2 + (K+1)(R+1).

Generation needs no Jacobi iterations. All earlier thoughts are known, so the thoughts of a new
token are computed in sequence: K+1 passes over one slot each, which share one cache:

    pass i <= K:       1 slot in, the token or z_i;  z_{i+1} <- hidden;  logits from hidden_K

With `interpolation` a thought is not the hidden state but the mixture: the scaled embeddings,
weighted by the next-token probabilities that the hidden state gives.
"""

import math

from torch import Tensor

from megatron_ponder.kernels.interleave import interleave
from megatron_ponder.ponder.method import Method, Mix
from megatron_ponder.ponder.plan import DecodingPlan, Pass, PassPlan


class PonderLM2(Method):
    """Latent thoughts as extra slots of the sequence; adds no parameters."""

    def plan(self, num_jacobi_iterations: int) -> PassPlan:
        """K growth passes, R Jacobi passes, the loss pass. K = 0: only the last, for any R."""
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
        """sqrt(2.5 h), which gives embeddings with small initialisation unit variance.

        sqrt(h) with `interpolation`, as in the authors' code.
        """
        if not self.config.scale_embeds:
            return None
        return math.sqrt(hidden_size if self.config.interpolation else 2.5 * hidden_size)

    def build_input(self, pass_: Pass, token_embeddings: Tensor, carry: Tensor | None) -> Tensor:
        """Each token's embedding, followed by the thoughts from the previous pass."""
        return interleave(token_embeddings, carry)

    def build_carry(
        self, pass_: Pass, outputs: Tensor, mix: Mix, pass_input: Tensor | None
    ) -> Tensor:
        """The next thoughts: hidden states, or mixtures."""
        return mix(outputs) if pass_.mixes_embeddings else outputs

    def decoding_plan(self, plan: PassPlan) -> DecodingPlan:
        """The slots of a token one by one, after all slots of the previous tokens."""
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
        """The token's embedding in the first pass, then the previous thought."""
        return token_embeddings if carry is None else carry
