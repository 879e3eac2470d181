"""What a training step really sends, as the dispatcher sees torch.distributed's operations."""

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.runtime.distributed import initialize
from megatron_ponder.train.run import build_training_state
from megatron_ponder.train.step import train_step
from tests.unit.planning.measured_memory import random_batches


class CountSent(TorchDispatchMode):
    """Adds up bytes that rings would send, by kind of operation."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, float] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__.strip("_")
            group = next(dist.ProcessGroup.unbox(a) for a in args if _is_group(a))
            size = group.size()
            tensors = [t for a in args for t in (a if isinstance(a, list) else [a])]
            nbytes = max((t.nbytes for t in tensors if isinstance(t, torch.Tensor)), default=0)
            share = 1.0 if name == "send" else (size - 1) / size
            times = share * (2 if name.startswith("allreduce") else 1)
            if name != "recv":
                self.sent[name] = self.sent.get(name, 0.0) + times * nbytes
        return func(*args, **(kwargs or {}))


def _is_group(value: object) -> bool:
    return isinstance(value, torch.ScriptObject) and "ProcessGroup" in str(value._type())


def measure_traffic(config: ResolvedConfig) -> dict[str, float]:
    """In a rank: bytes that it sends in one training step."""
    initialize(config.parallel, config.training.seed)
    training_state = build_training_state(config)
    batches = random_batches(config)
    with CountSent() as counter:
        train_step(config, training_state, batches, iteration=1, wants_stop=False).fetch()
    return counter.sent
