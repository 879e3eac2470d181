"""ponderlm2 as it is defined: slot after slot, all recomputed, on a stock transformers model.

Nothing of the exported code runs here but the settings that it is given.
"""

import dataclasses
import math
from typing import Any

import torch
import transformers
from torch import Tensor

LOGITS_ABSOLUTE = 1e-5
"""Other orders of summation; logits are of order 1."""
LOSS_ABSOLUTE = 1e-5
"""As logits; the loss is about 5."""
GRADIENT_RELATIVE = 1e-5
"""Of a gradient's largest entry, against the authors' code."""


def largest_difference(actual: Tensor, expected: Tensor) -> float:
    """Largest absolute difference; NaN counts as infinite."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = (actual.detach().double() - expected.detach().double()).abs()
    return float(torch.nan_to_num(difference, nan=float("inf")).max())


@dataclasses.dataclass
class Sequential:
    """A model of K thoughts per token, computed one slot at a time.

    Args:
        exported: the model whose weights are used.
    """

    exported: Any

    def __post_init__(self) -> None:
        stock_class = next(
            c for c in type(self.exported).__mro__ if c.__module__.startswith("transformers.models")
        )
        assert hasattr(transformers, stock_class.__name__)
        stock = stock_class(self.exported.config).eval()
        stock.load_state_dict(self.exported.state_dict())
        self.base, self.head = stock.base_model, stock.get_output_embeddings()
        self.table = stock.get_input_embeddings()

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """[b, s] -> [b, s, v]."""
        config = self.exported.config
        stages = config.num_latent_thoughts + 1
        scale = math.sqrt(2.5 * config.hidden_size)
        slots: list[Tensor] = []
        read = []
        for t in range(ids.size(1)):
            slot = self.table(ids[:, t]) * scale
            for _ in range(stages):
                slots.append(slot)
                positions = torch.arange(len(slots)) // stages
                mask = torch.ones(ids.size(0), len(slots), dtype=torch.long)
                slot = self.base(
                    inputs_embeds=torch.stack(slots, dim=1),
                    position_ids=positions.expand(ids.size(0), -1),
                    attention_mask=mask,
                    use_cache=False,
                ).last_hidden_state[:, -1]
            read.append(slot)
        return self.head(torch.stack(read, dim=1))

    def greedy(self, ids: Tensor, num_new: int) -> Tensor:
        """[b, s] -> [b, s + num_new]."""
        for _ in range(num_new):
            ids = torch.cat((ids, self.logits(ids)[:, -1:].argmax(-1)), dim=1)
        return ids
