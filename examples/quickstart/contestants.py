"""The models that the quickstart compares: one per method."""

import dataclasses

from megatron_ponder.data.sentencepiece_training import PAUSE_ID
from megatron_ponder.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """One of the compared models."""

    name: str
    """Name of its folder."""
    title: str
    """Name in reports."""
    flags: tuple[str, ...]
    """The flags in which it differs from the others."""
    train_estimate_s: float
    """Training time on 2 cores, in seconds."""
    evaluate_estimate_s: float
    """Evaluation time on 2 cores, in seconds."""


CONTESTANTS = (
    Contestant(
        name="vanilla",
        title="vanilla",
        flags=("--method", "vanilla"),
        train_estimate_s=45,
        evaluate_estimate_s=12,
    ),
    Contestant(
        name="ponderlm2",
        title="PonderLM-2",
        flags=("--method", "ponderlm2"),
        train_estimate_s=180,
        evaluate_estimate_s=40,
    ),
    # K = 3 as in the paper's comparison: each costs about four vanilla forwards.
    Contestant(
        name="ponderlm",
        title="PonderLM",
        flags=("--method", "ponderlm", "--num-latent-thoughts", "3"),
        train_estimate_s=155,
        evaluate_estimate_s=30,
    ),
    Contestant(
        name="loop",
        title="loop",
        flags=("--method", "loop", "--num-latent-thoughts", "3"),
        train_estimate_s=110,
        evaluate_estimate_s=15,
    ),
    Contestant(
        name="pause",
        title="pause",
        flags=(
            *("--method", "pause", "--num-latent-thoughts", "3"),
            *("--pause-token-id", str(PAUSE_ID)),
        ),
        train_estimate_s=150,
        evaluate_estimate_s=17,
    ),
)


def chosen_contestants(methods: str) -> tuple[Contestant, ...]:
    """The models that --methods names, in the order of CONTESTANTS.

    Raises:
        ConfigError: a name is unknown or empty.
    """
    by_name = {contestant.name: contestant for contestant in CONTESTANTS}
    wanted = list(by_name) if methods == "all" else [m.strip() for m in methods.split(",")]
    if unknown := [name for name in wanted if name not in by_name]:
        raise ConfigError(
            f"--methods {methods}: unknown: {', '.join(map(repr, unknown))}. Give some of "
            f"{','.join(by_name)}, or all."
        )
    return tuple(contestant for name, contestant in by_name.items() if name in wanted)
