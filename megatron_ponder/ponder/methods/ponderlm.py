"""ponderlm: K more passes over the same tokens, each fed with what the one before predicts.

PonderLM, the predecessor of PonderLM-2. The probabilities of the next token at each position mix
the embeddings of the vocabulary; the mixture is added to the token's own embedding, and the model
runs again. No slot is added: the sequence stays s long.

    mixture_i = softmax(head(hidden_i)) times the scaled embedding table
    x_0 = e;    x_{i+1} = e + mixture_i           or, with `residual_interpolated_embeds`,
                x_{i+1} = x_i + mixture_i

`ponderlm_feedback = hidden` is what the authors' GPT-NeoX file of this name computes instead: no
mixture and no scale, x_{i+1} = x_i + hidden_i, from standard initialisation.

Linear work in vanilla forwards: K+1; mixing adds two products with the vocabulary per extra pass.
"""

import math
from typing import Literal

from torch import Tensor

from megatron_ponder.ponder.method import Method, Mix
from megatron_ponder.ponder.plan import Pass, PassPlan


class PonderLM(Method):
    """Pondering by mixtures of embeddings; R is ignored."""

    def plan(self, num_jacobi_iterations: int) -> PassPlan:
        """K+1 passes over the tokens; the last is read by the loss."""
        k = self.config.num_latent_thoughts
        return PassPlan(
            passes=tuple(
                Pass(
                    index=index,
                    slots_per_token=1,
                    output_slots=range(1),
                    embeds_tokens=index == 0 or not self._accumulates,
                    mixes_embeddings=self._mixes and index < k,
                    carries_input=self._accumulates and index < k,
                )
                for index in range(k + 1)
            )
        )

    @property
    def default_init_method(self) -> Literal["normal", "small"]:
        """Small, but for the form that the authors have in GPT-NeoX only."""
        return "small" if self._mixes else "normal"

    def embedding_scale(self, hidden_size: int) -> float | None:
        """sqrt(h), for the embeddings that are looked up and for those that are mixed."""
        return math.sqrt(hidden_size) if self.config.scale_embeds and self._mixes else None

    def build_input(self, pass_: Pass, token_embeddings: Tensor, carry: Tensor | None) -> Tensor:
        """The token embeddings, and from the second pass on what the one before gave."""
        if carry is None:
            return token_embeddings
        return carry if self._accumulates else token_embeddings + carry

    def build_carry(
        self, pass_: Pass, outputs: Tensor, mix: Mix, pass_input: Tensor | None
    ) -> Tensor:
        """The mixture or the hidden states, added to the pass's input where they accumulate."""
        fed_back = mix(outputs) if self._mixes else outputs
        return fed_back if pass_input is None else pass_input + fed_back

    @property
    def _mixes(self) -> bool:
        """Whether mixtures of embeddings are fed back, not hidden states."""
        return self.config.ponderlm_feedback == "mixture"

    @property
    def _accumulates(self) -> bool:
        """Whether a pass adds to the input of the one before, not to the token embeddings."""
        return self.config.residual_interpolated_embeds or not self._mixes
