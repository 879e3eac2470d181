"""loop: the stack of layers applied K+1 times in a row, a looped transformer.

The residual stream that leaves the last layer enters the first one again, as it is: no norm, and
the token embeddings are not added a second time. The final norm runs once, at the end; learned
positions are added once, before the first layer. The sequence stays s long.

Linear work in vanilla forwards: K+1.
"""

import math

from torch import Tensor

from megatron_ponder.ponder.method import Method
from megatron_ponder.ponder.plan import Pass, PassPlan


class Loop(Method):
    """More depth from the same weights; R and `scale_embeds` are ignored."""

    def plan(self, num_jacobi_iterations: int) -> PassPlan:
        """K+1 passes over the tokens, normed after the last only."""
        k = self.config.num_latent_thoughts
        return PassPlan(
            passes=tuple(
                Pass(
                    index=index,
                    slots_per_token=1,
                    output_slots=range(1),
                    final_norm=index == k,
                    add_positions=index == 0,
                    embeds_tokens=index == 0,
                )
                for index in range(k + 1)
            )
        )

    def embedding_scale(self, hidden_size: int) -> float | None:
        """sqrt(2.5 h), always."""
        return math.sqrt(2.5 * hidden_size)

    def build_input(self, pass_: Pass, token_embeddings: Tensor, carry: Tensor | None) -> Tensor:
        """The token embeddings, then the residual stream of the pass before."""
        return token_embeddings if carry is None else carry
