"""The golden cases: numbers of the PonderLM-2 authors' code, as our settings and tensors.

`cases/NAME/` holds the Hugging Face config and weights of a small random model, token ids, and what
the authors' code (stock transformers for vanilla) computed from them on CPU in fp32.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.convert.config_mapping import read_model_settings
from megatron_ponder.convert.method_mapping import read_method

FOLDER = Path(__file__).parent / "cases"
NAMES = sorted(path.name for path in FOLDER.iterdir())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One golden case."""

    config: RunConfig
    """Resolved for one process."""
    weights: dict[str, Tensor]
    """By Hugging Face name."""
    input_ids: Tensor
    """int64 [2, 12]; also the labels, which the loss shifts by one token."""
    logits: Tensor
    """[2, 12, v] in evaluation mode."""
    loss: float
    """Mean next-token cross entropy in training mode."""
    gradients: dict[str, Tensor]
    """Of the loss, by Hugging Face name."""


def load_case(name: str, **settings: Any) -> Case:
    """A case by folder name; `settings` change its config before it is resolved."""
    folder = FOLDER / name
    stored = json.loads((folder / "config.json").read_text())
    numbers = load_file(folder / "case.safetensors")
    config = RunConfig().replaced(
        seq_length=numbers["input_ids"].size(1),
        **read_model_settings(stored),
        **read_method(stored, {}).result,
    )
    world_size = math.prod(
        settings.get(f"{kind}_model_parallel_size", 1) for kind in ("tensor", "pipeline")
    )
    config = config.replaced(**settings)
    return Case(
        config=resolve(config, world_size=world_size, tokenizer_vocab_size=None),
        weights=load_file(folder / "model.safetensors"),
        input_ids=numbers["input_ids"],
        logits=numbers["logits"],
        loss=float(numbers["loss"]),
        gradients={k.removeprefix("grad."): t for k, t in numbers.items() if k.startswith("grad.")},
    )
