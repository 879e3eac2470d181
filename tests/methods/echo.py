"""echo: every token is followed by one slot that summarises the model's outputs for the token.

The first pass runs over the tokens alone. Each of the K further passes has two slots per token: the
token and its echo, which is the mean of the previous pass's hidden states for that token. The next
token is predicted at the echo. Not from a paper: this is the example of docs/adding-a-method.md.
"""

import math

from torch import Tensor

from megatron_ponder.kernels.interleave import interleave
from megatron_ponder.ponder.method import Method
from megatron_ponder.ponder.plan import Pass, PassPlan


class Echo(Method):
    """K refinements of one extra slot; R is ignored."""

    def plan(self, num_jacobi_iterations: int) -> PassPlan:
        """One pass over tokens, K over tokens and echoes; each hands on all its outputs."""
        k = self.config.num_latent_thoughts
        slots = [1] + [2] * k
        passes = [
            Pass(index=i, slots_per_token=n, output_slots=range(n)) for i, n in enumerate(slots)
        ]
        last = slots[-1]
        passes[-1] = Pass(index=k, slots_per_token=last, output_slots=range(last - 1, last))
        return PassPlan(passes=tuple(passes))

    def embedding_scale(self, hidden_size: int) -> float | None:
        """Unit variance under small initialisation, like that of normed hidden states."""
        return math.sqrt(2.5 * hidden_size) if self.config.scale_embeds else None

    def build_input(self, pass_: Pass, token_embeddings: Tensor, carry: Tensor | None) -> Tensor:
        """Each token, followed by the mean of the carry for that token."""
        if carry is None:
            return token_embeddings
        s, b, h = token_embeddings.shape
        # [s * m, b, h] -> [s, m, b, h] -> [s, b, h]
        echoes = carry.view(s, -1, b, h).mean(dim=1)
        return interleave(token_embeddings, echoes)
