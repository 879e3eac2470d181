"""vanilla: a plain language model. One pass, unscaled embeddings, standard initialisation."""

from typing import Literal

from torch import Tensor

from megatron_ponder.ponder.method import Method
from megatron_ponder.ponder.plan import Pass, PassPlan


class Vanilla(Method):
    """The baseline: K, R and `scale_embeds` are ignored."""

    @property
    def default_init_method(self) -> Literal["normal", "small"]:
        """Standard initialisation."""
        return "normal"

    def plan(self, num_jacobi_iterations: int) -> PassPlan:
        """One pass over the tokens."""
        return PassPlan(passes=(Pass(index=0, slots_per_token=1, output_slots=range(1)),))

    def embedding_scale(self, hidden_size: int) -> float | None:
        """None: embeddings are not scaled."""
        return None

    def build_input(self, pass_: Pass, token_embeddings: Tensor, carry: Tensor | None) -> Tensor:
        """The token embeddings."""
        return token_embeddings
