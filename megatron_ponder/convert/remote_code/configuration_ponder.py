"""Configurations of exported models: the stock architecture's plus the method's settings.

All stock keys stay what they are. `model_type` is our own, because stock code that found its own
there would run a plain model on these weights, whose numbers look right and are not. The settings
have the names that the run's configuration gives them; keys of older checkpoints of the method's
authors are read too. What a setting does to the forward is in passes.py.
"""

import math
from typing import Any, ClassVar

import transformers

logger = transformers.utils.logging.get_logger(__name__)

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


# Before anything is taken from it: older ones lack some of the classes below.
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
    """Remove the method's settings from `keys`, under new and old names, and return them all.

    `model_type` goes too: older exports and the authors' checkpoints have the stock one.
    """
    keys.pop("model_type", None)
    if "method" not in keys and ("num_latent_thoughts" in keys or "more_iterations" in keys):
        logger.warning_once(
            "config.json has thoughts and does not name their method: ponderlm2 is taken. If it is "
            "another one, all numbers are wrong: write it there as `method`."
        )
    settings = {}
    for name, default in SETTINGS.items():
        old = keys.pop(OLD_NAMES[name], default) if name in OLD_NAMES else default
        settings[name] = keys.pop(name, old)
    return settings


class PonderConfig:
    """What follows from the settings; mixed into a stock configuration."""

    model_type: ClassVar[str]
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

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> Any:
        """As the stock function, which would warn of the stock `model_type` of older folders."""
        keys, rest = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        if f"ponder_{keys.get('model_type')}" == cls.model_type:
            del keys["model_type"]
        return keys, rest

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


class PonderLlamaConfig(PonderConfig, transformers.LlamaConfig):
    """Llama."""

    model_type = "ponder_llama"

    def __init__(self, **keys: Any) -> None:
        settings = take_settings(keys)
        super().__init__(**keys)
        self.set_settings(settings)


class PonderGPTNeoXConfig(PonderConfig, transformers.GPTNeoXConfig):
    """GPT-NeoX (Pythia)."""

    model_type = "ponder_gpt_neox"

    def __init__(self, **keys: Any) -> None:
        settings = take_settings(keys)
        super().__init__(**keys)
        self.set_settings(settings)


class PonderGPT2Config(PonderConfig, transformers.GPT2Config):
    """GPT-2."""

    model_type = "ponder_gpt2"

    def __init__(self, **keys: Any) -> None:
        settings = take_settings(keys)
        super().__init__(**keys)
        self.set_settings(settings)


class PonderMistralConfig(PonderConfig, transformers.MistralConfig):
    """Mistral, dense."""

    model_type = "ponder_mistral"

    def __init__(self, **keys: Any) -> None:
        settings = take_settings(keys)
        super().__init__(**keys)
        self.set_settings(settings)


class PonderQwen2Config(PonderConfig, transformers.Qwen2Config):
    """Qwen2, dense."""

    model_type = "ponder_qwen2"

    def __init__(self, **keys: Any) -> None:
        settings = take_settings(keys)
        super().__init__(**keys)
        self.set_settings(settings)


class PonderQwen3Config(PonderConfig, transformers.Qwen3Config):
    """Qwen3, dense."""

    model_type = "ponder_qwen3"

    def __init__(self, **keys: Any) -> None:
        settings = take_settings(keys)
        super().__init__(**keys)
        self.set_settings(settings)
