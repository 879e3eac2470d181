"""The output slots of a pass, and how the layers learn of them.

The model's last layer computes only the slots whose outputs the pass uses. megatron-core's block
hands a fixed set of arguments to its layers. Of those, `packed_seq_params` is the one that may be
any object, that the block itself never looks at, and that its recompute keeps as it is (0.16 to
0.19); so the pass travels in it. `layer.py` unpacks it, once.
"""

from torch import Tensor

from megatron_ponder.kernels.interleave import select_slots
from megatron_ponder.ponder.plan import Pass


def select_outputs(hidden: Tensor, pass_: Pass | None) -> Tensor:
    """[s * slots_per_token, b, h] -> [s * outputs_per_token, b, h]; without a pass `hidden`."""
    if pass_ is None:
        return hidden
    return select_slots(hidden, pass_.slots_per_token, pass_.output_slots)
