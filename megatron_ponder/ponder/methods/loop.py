"""loop: a looped transformer, whose stack of layers is applied K+1 times in a row.

The residual stream after the last layer is the input of the first layer again, unchanged: it is not
normed, and the token embeddings are not added a second time. The final norm runs once, at the end.
Learned positions are added once, before the first layer. The sequence length stays s.

Linear work in vanilla forwards: K+1.
"""

import math

from torch import Tensor

from megatron_ponder.ponder.method import Method
from megatron_ponder.ponder.plan import Pass, PassPlan


class Loop(Method):
    """More depth from the same weights; R and `scale_embeds` are ignored."""

    def plan(self, num_jacobi_iterations: int) -> PassPlan:
        """K+1 passes over the tokens, with the final norm in the last only."""
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
        """sqrt(2.5 h), whatever `scale_embeds` is."""
        return math.sqrt(2.5 * hidden_size)

    def build_input(self, pass_: Pass, token_embeddings: Tensor, carry: Tensor | None) -> Tensor:
        """The token embeddings in the first pass, then the previous pass's residual stream."""
        return token_embeddings if carry is None else carry
