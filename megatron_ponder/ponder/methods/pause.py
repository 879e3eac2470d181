"""pause: K pause tokens after every token, and one pass over all of them.

Pause tokens give the model K more slots of computation before each prediction. They make the
sequence longer, and there is no feedback. All pause tokens share one row of the vocabulary, which
is scaled and trained like any other. The slots of a token share its position. The last slot
predicts the next token.

Linear work in vanilla forwards: K+1.
"""

import math
from typing import Literal

from torch import Tensor

from megatron_ponder.ponder.method import Method
from megatron_ponder.ponder.plan import Pass, PassPlan


class Pause(Method):
    """Extra slots without thoughts; R is ignored."""

    def plan(self, num_jacobi_iterations: int) -> PassPlan:
        """One pass, whose output slot is the last pause slot."""
        k = self.config.num_latent_thoughts
        return PassPlan(
            passes=(Pass(index=0, slots_per_token=k + 1, output_slots=range(k, k + 1)),),
        )

    @property
    def default_init_method(self) -> Literal["normal", "small"]:
        """A setting, because it differs between the authors' architectures."""
        return self.config.pause_init_method

    @property
    def extra_token_ids(self) -> tuple[int, ...]:
        """The pause token, K times."""
        assert self.config.pause_token_id is not None
        return (self.config.pause_token_id,) * self.config.num_latent_thoughts

    def embedding_scale(self, hidden_size: int) -> float | None:
        """sqrt(h) or no scale. `scale_embeds` is ignored in some of the authors' architectures."""
        is_scaled = self.config.scale_embeds or self.config.pause_always_scales
        return math.sqrt(hidden_size) if is_scaled else None

    def build_input(self, pass_: Pass, token_embeddings: Tensor, carry: Tensor | None) -> Tensor:
        """Each token's embedding, followed by those of its pause tokens."""
        return token_embeddings
