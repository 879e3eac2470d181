"""ponderlm: K more passes over the same tokens, each fed the prediction of the previous pass.

PonderLM, the predecessor of PonderLM-2. The next-token probabilities at each position weight the
embeddings of the vocabulary. The resulting mixture is added to the token's own embedding, and the
model runs again. No slot is added: the sequence length stays s.

    mixture_i = softmax(head(hidden_i)) times the scaled embedding table
    x_0 = e;    x_{i+1} = e + mixture_i           or, with `residual_interpolated_embeds`,
                x_{i+1} = x_i + mixture_i

`ponderlm_feedback = hidden` reproduces the authors' GPT-NeoX file of the same name, which differs:
no mixture, no scale, x_{i+1} = x_i + hidden_i, and standard initialisation.

Linear work in vanilla forwards: K+1; mixing adds two matmuls with the vocabulary per extra pass.
"""

import math
from typing import Literal

from torch import Tensor

from megatron_ponder.ponder.method import Method, Mix
from megatron_ponder.ponder.plan import Pass, PassPlan


class PonderLM(Method):
    """Pondering by mixtures of embeddings; R is ignored."""

    def plan(self, num_jacobi_iterations: int) -> PassPlan:
        """K+1 passes over the tokens; the last is the loss pass."""
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
        """Small; normal with `ponderlm_feedback = hidden`, the authors' GPT-NeoX form."""
        return "small" if self._mixes else "normal"

    def embedding_scale(self, hidden_size: int) -> float | None:
        """sqrt(h), for both the looked-up and the mixed embeddings."""
        return math.sqrt(hidden_size) if self.config.scale_embeds and self._mixes else None

    def build_input(self, pass_: Pass, token_embeddings: Tensor, carry: Tensor | None) -> Tensor:
        """The token embeddings; from the second pass on, with the feedback added."""
        if carry is None:
            return token_embeddings
        return carry if self._accumulates else token_embeddings + carry

    def build_carry(
        self, pass_: Pass, outputs: Tensor, mix: Mix, pass_input: Tensor | None
    ) -> Tensor:
        """The mixture or the hidden states, plus the pass's input if the feedback accumulates."""
        fed_back = mix(outputs) if self._mixes else outputs
        return fed_back if pass_input is None else pass_input + fed_back

    @property
    def _mixes(self) -> bool:
        """Whether mixtures of embeddings are fed back, instead of hidden states."""
        return self.config.ponderlm_feedback == "mixture"

    @property
    def _accumulates(self) -> bool:
        """Whether feedback is added to the previous pass's input, not to the token embeddings."""
        return self.config.residual_interpolated_embeds or not self._mixes
