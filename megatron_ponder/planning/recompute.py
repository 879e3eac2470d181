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


def recomputations(plan: PassPlan) -> Iterator[Settings]:
    """Choices for the passes of a plan, as changes to KEEP_ALL.

    Units of several layers, and of some layers, are left out.
    """
    yield {"recompute_granularity": "selective"}
    for n in range(1, len(plan.passes) - plan.first_grad_pass - 1):
        yield {"recompute_granularity": "pass", "recompute_num_passes": n}
    yield {"recompute_granularity": "pass"}
    yield {"recompute_granularity": "full"}
