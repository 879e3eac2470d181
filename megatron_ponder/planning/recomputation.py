"""What a run can recompute, from that which costs no product to that which costs most."""

from collections.abc import Iterator
from typing import Any

from megatron_ponder.ponder.plan import PassPlan

Settings = dict[str, Any]
KEEP_ALL: Settings = {
    "recompute_granularity": None,
    "recompute_method": "uniform",
    "recompute_num_layers": 1,
    "recompute_num_passes": None,
}


def recomputations(plan: PassPlan) -> Iterator[tuple[str, Settings]]:
    """Choices for the passes of a plan, each with the flags that a run gives for it.

    Units of several layers, and of some layers, are left out.
    """
    flag = "--recompute-granularity"
    yield f"{flag} selective", KEEP_ALL | {"recompute_granularity": "selective"}
    by_pass = KEEP_ALL | {"recompute_granularity": "pass"}
    for n in range(1, len(plan.passes) - plan.first_grad_pass - 1):
        yield f"{flag} pass --recompute-num-passes {n}", by_pass | {"recompute_num_passes": n}
    yield f"{flag} pass", by_pass
    yield f"{flag} full", KEEP_ALL | {"recompute_granularity": "full"}
