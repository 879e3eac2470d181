"""The models that the quickstart compares: one per method."""

import dataclasses

from megatron_ponder.data.sentencepiece_training import PAUSE_ID
from megatron_ponder.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Contestant:
    """One of the models that are compared."""

    name: str
    """Of its folder."""
    title: str
    """As it is shown."""
    flags: tuple[str, ...]
    """What sets it apart from the others."""
    train_estimate_s: float
    """Seconds of its training, on 2 cores."""
    evaluate_estimate_s: float
    """Seconds of its evaluation, on 2 cores."""


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
    # With K = 3, as in the paper's comparison: four vanilla forwards each.
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
    """Those that --methods names, in the order of CONTESTANTS.

    Raises:
        ConfigError: a name that is none of them, or no name.
    """
    by_name = {contestant.name: contestant for contestant in CONTESTANTS}
    wanted = list(by_name) if methods == "all" else [m.strip() for m in methods.split(",")]
    if unknown := [name for name in wanted if name not in by_name]:
        raise ConfigError(
            f"--methods {methods}: no method {', '.join(map(repr, unknown))} here. Give some of "
            f"{','.join(by_name)}, or all."
        )
    return tuple(contestant for name, contestant in by_name.items() if name in wanted)
