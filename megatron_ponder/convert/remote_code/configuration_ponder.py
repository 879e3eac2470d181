"""Configurations of exported models: the stock architecture's plus the method's settings.

`model_type` and all stock keys stay what they are, so that stock code still reads the file. The
settings have the names that the run's configuration gives them; keys of older checkpoints of the
method's authors are read too. What a setting does to the forward is in passes.py.
"""

import math
from typing import Any

import transformers
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

OLDEST_TRANSFORMERS = "4.56.0"
"""Tested; older ones have caches without layers, or layers without what is needed of them."""


def check_transformers(version: str) -> None:
    """Raise ImportError for a transformers that is too old."""
    given, needed = (
        tuple(int(part) for part in text.split(".")[:2]) for text in (version, OLDEST_TRANSFORMERS)
    )
    if given < needed:
        raise ImportError(
            f"This model needs transformers {OLDEST_TRANSFORMERS} or newer, {version} is "
            f"installed: pip install 'transformers>={OLDEST_TRANSFORMERS}'."
        )


check_transformers(transformers.__version__)

SETTINGS: dict[str, Any] = {
    "method": "ponderlm2",
    "recurrent_model": True,
    "num_latent_thoughts": 1,
    "num_jacobi_iterations": 3,
    "random_jacobi_iterations": False,
    "min_jacobi_iterations": 2,
    "max_jacobi_iterations": 3,
    "scale_embeds": True,
    "interpolation": False,
    "interpolation_use_topk": False,
    "interpolation_topk": 100,
    "residual_interpolated_embeds": False,
    "ponderlm_feedback": "mixture",
    "pause_token_id": None,
    "pause_always_scales": True,
}
"""The keys beside the stock ones, with the values that an absent key has."""

OLD_NAMES = {
    "num_latent_thoughts": "more_iterations",
    "num_jacobi_iterations": "eval_refinement_steps",
    "random_jacobi_iterations": "vary_refine_steps",
}
"""Names that older checkpoints use for some of them."""

CHOICES = {
    "method": ("vanilla", "ponderlm2", "ponderlm", "loop", "pause"),
    "ponderlm_feedback": ("mixture", "hidden"),
}
COUNTS = {
    "num_latent_thoughts": 0,
    "num_jacobi_iterations": 0,
    "min_jacobi_iterations": 0,
    "max_jacobi_iterations": 0,
    "interpolation_topk": 1,
}
"""Whole numbers and the smallest that makes sense."""


def take_settings(keys: dict[str, Any]) -> dict[str, Any]:
    """Remove the method's settings from `keys`, under new and old names, and return them all."""
    settings = {}
    for name, default in SETTINGS.items():
        old = keys.pop(OLD_NAMES[name], default) if name in OLD_NAMES else default
        settings[name] = keys.pop(name, old)
    return settings


class PonderConfig:
    """What follows from the settings; mixed into a stock configuration."""

    method: str
    recurrent_model: bool
    num_latent_thoughts: int
    num_jacobi_iterations: int
    random_jacobi_iterations: bool
    min_jacobi_iterations: int
    max_jacobi_iterations: int
    scale_embeds: bool
    interpolation: bool
    interpolation_use_topk: bool
    interpolation_topk: int
    residual_interpolated_embeds: bool
    ponderlm_feedback: str
    pause_token_id: int | None
    pause_always_scales: bool
    hidden_size: int
    vocab_size: int

    keys_to_ignore_at_inference = ["past_key_values", "cache", "jacobi_iterations"]

    def set_settings(self, settings: dict[str, Any]) -> None:
        """Store what `take_settings` returned."""
        for name, value in settings.items():
            setattr(self, name, value)
        self.check_settings()

    def check_settings(self) -> None:
        """Raise ValueError for values that no model can have, naming all of them."""
        wrong = [
            f"{name} = {getattr(self, name)!r} is none of {', '.join(choices)}"
            for name, choices in CHOICES.items()
            if getattr(self, name) not in choices
        ]
        wrong += [
            f"{name} = {getattr(self, name)!r} is not a whole number from {smallest} on"
            for name, smallest in COUNTS.items()
            if not isinstance(getattr(self, name), int) or getattr(self, name) < smallest
        ]
        if not wrong and self.min_jacobi_iterations > self.max_jacobi_iterations:
            wrong.append(
                f"min_jacobi_iterations = {self.min_jacobi_iterations} is larger than "
                f"max_jacobi_iterations = {self.max_jacobi_iterations}"
            )
        if self.effective_method == "pause":
            row = self.pause_token_id
            if not isinstance(row, int) or not 0 <= row < self.vocab_size:
                wrong.append(
                    f"pause_token_id = {row!r} is no row of a vocabulary of {self.vocab_size}"
                )
        if wrong:
            raise ValueError("config.json: " + "; ".join(wrong) + ".")

    @property
    def effective_method(self) -> str:
        """The method that the forward runs; `recurrent_model` false means none."""
        return self.method if self.recurrent_model else "vanilla"

    @property
    def slots_per_token(self) -> int:
        """Positions of the sequence that a token takes: itself and what follows it."""
        has_slots = self.effective_method in ("ponderlm2", "pause")
        return self.num_latent_thoughts + 1 if has_slots else 1

    @property
    def num_caches(self) -> int:
        """Passes whose keys and values later tokens attend to, each its own."""
        has_passes = self.effective_method in ("ponderlm", "loop")
        return self.num_latent_thoughts + 1 if has_passes else 1

    @property
    def mixes_embeddings(self) -> bool:
        """Whether mixtures of embeddings are fed back, not hidden states."""
        if self.effective_method == "ponderlm":
            return self.ponderlm_feedback == "mixture"
        return self.effective_method == "ponderlm2" and self.interpolation

    @property
    def embedding_scale(self) -> float | None:
        """Factor on token embeddings, before it is rounded to their dtype; None: not scaled."""
        small, large = math.sqrt(self.hidden_size), math.sqrt(2.5 * self.hidden_size)
        match self.effective_method:
            case "loop":
                return large
            case "pause":
                return small if self.scale_embeds or self.pause_always_scales else None
            case "ponderlm":
                return small if self.scale_embeds and self.mixes_embeddings else None
            case "ponderlm2" if self.scale_embeds:
                return small if self.interpolation else large
        return None


class PonderLlamaConfig(PonderConfig, LlamaConfig):
    """Llama."""

    def __init__(self, **keys: Any) -> None:
        settings = take_settings(keys)
        super().__init__(**keys)
        self.set_settings(settings)


class PonderGPTNeoXConfig(PonderConfig, GPTNeoXConfig):
    """GPT-NeoX (Pythia)."""

    def __init__(self, **keys: Any) -> None:
        settings = take_settings(keys)
        super().__init__(**keys)
        self.set_settings(settings)


class PonderGPT2Config(PonderConfig, GPT2Config):
    """GPT-2."""

    def __init__(self, **keys: Any) -> None:
        settings = take_settings(keys)
        super().__init__(**keys)
        self.set_settings(settings)


class PonderMistralConfig(PonderConfig, MistralConfig):
    """Mistral, dense."""

    def __init__(self, **keys: Any) -> None:
        settings = take_settings(keys)
        super().__init__(**keys)
        self.set_settings(settings)


class PonderQwen2Config(PonderConfig, Qwen2Config):
    """Qwen2, dense."""

    def __init__(self, **keys: Any) -> None:
        settings = take_settings(keys)
        super().__init__(**keys)
        self.set_settings(settings)


class PonderQwen3Config(PonderConfig, Qwen3Config):
    """Qwen3, dense."""

    def __init__(self, **keys: Any) -> None:
        settings = take_settings(keys)
        super().__init__(**keys)
        self.set_settings(settings)
