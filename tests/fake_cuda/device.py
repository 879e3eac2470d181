"""A CUDA device of which tensors have a place and a shape, and nothing in them.

torch's FakeTensorMode keeps the device of every tensor and refuses operations that mix two, which
is what a run on a GPU does. What asks the driver is answered by driver.c (loaded by the caller of
this process) and below. Triton's kernels are not run: where they would be, the devices of their
arguments are checked. Whatever makes the host wait for the device is noted.

Left out: numbers, memory, time, NCCL, TransformerEngine, apex.
"""

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

PLACE = torch.device("cuda", 0)
HOPPER = (9, 0)
ROOT = Path(__file__).parents[2]
aten = torch.ops.aten


class FakeDevice(FakeTensorMode):
    """Inside, tensors are fake, on whatever device is asked for; see the module."""

    avoid_device_init = True
    """Where numbers become a CUDA tensor: torch would make a real one first."""

    def __init__(self) -> None:
        # States of random generators on the CPU stay what they are.
        super().__init__(allow_non_fake_inputs=True)
        self.waits: list[str] = []
        """Why, and the line of the package, of megatron-core or of torch that did it."""

    def dispatch(self, func: Any, types: Any, args: Sequence = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            if args[0].device.type == "cuda":
                self.note("reads a number")
            elif args[0].constant is not None:
                return super().dispatch(func, types, args, kwargs)
            return _made_up(args[0].dtype)
        out = super().dispatch(func, types, args, kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            source = args[0] if func is aten._to_copy.default else args[1]
            if source.device.type == "cuda" and out.device.type == "cpu":
                self.note("copies to the CPU")
            # torch waits for the device behind a copy that is not said to be asynchronous.
            is_waited_for = (
                not (kwargs or {}).get("non_blocking") and (args + (False,) * 3)[2] is False
            )
            if source.device.type == "cpu" and out.device.type == "cuda" and is_waited_for:
                self.note("copies to the device")
        return out

    def note(self, why: str) -> None:
        """Keep a wait, with the innermost line of ours or of megatron-core's behind it."""
        frames = [
            frame
            for frame in traceback.extract_stack()
            if frame.filename != __file__
            and (frame.filename.startswith(f"{ROOT}/") or "/megatron/core/" in frame.filename)
        ]
        where = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"
        self.waits.append(f"{why} at {where.removeprefix(f'{ROOT}/')}")


def _made_up(dtype: torch.dtype) -> float | int | bool:
    """A number for a tensor that has none: true, so that checks of random states pass."""
    return 1.0 if dtype.is_floating_point else True if dtype is torch.bool else 1


class Stream:
    """A stream, or an event; nothing ever runs."""

    def __init__(self, *unused: Any, **more: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *unused, **more: None


def install() -> None:
    """Let `torch.cuda`, Triton, megatron-core and random initialisation do without a device."""
    cuda: Any = torch.cuda
    cuda.is_available = lambda: True
    cuda.current_device = lambda: PLACE.index
    cuda.get_device_name = lambda device=None: "NVIDIA H100 (fake)"
    cuda.get_device_capability = lambda device=None: HOPPER
    # torch's own check of what --nproc-per-node asks for; one process stands for each rank.
    cuda.device_count = lambda: 1
    for name in ("set_device", "manual_seed", "set_rng_state", "empty_cache"):
        setattr(cuda, name, lambda *unused, **more: None)
    cuda.get_rng_state = lambda device=None: torch.zeros(16, dtype=torch.uint8)
    cuda.Stream = cuda.Event = Stream
    cuda.current_stream = cuda.default_stream = Stream
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.synchronize = lambda device=None: None
    cuda.nccl.version = lambda: (2, 28, 0)
    torch.backends.cudnn.version = lambda: 91900
    # Rejection sampling goes on until numbers fit, and there are none.
    torch.nn.init.trunc_normal_ = lambda tensor, *unused, **more: tensor
    _keep_small_constants()
    _check_triton_launches()
    _adapt_megatron_core()
    _materialize_masks()


def _keep_small_constants() -> None:
    """Tensors made of a few numbers on the CPU keep them, as layers read which stages to keep."""
    fake_tensor.CONSTANT_NUMEL_LIMIT = 16
    original = FakeTensor.tolist

    def tolist(self: FakeTensor) -> Any:
        if self.constant is None:
            return original(self)
        with _disable_current_modes():
            return self.constant.tolist()

    FakeTensor.tolist = tolist


def _check_triton_launches() -> None:
    """Instead of a kernel, the check that all its tensors are on the current device."""
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **more: Any) -> None:
        places = {arg.device for arg in args if isinstance(arg, torch.Tensor)}
        assert places == {PLACE}, f"{self.fn.__name__} is launched on tensors on {places}"

    JITFunction.run = run


def _materialize_masks() -> None:
    """torch's lower-right mask is a tensor without an operator that makes it: no fake of it."""
    from megatron_ponder.model import attention

    def mask(num_queries: int, num_keys: int) -> torch.Tensor:
        whole = torch.ones(num_queries, num_keys, dtype=torch.bool, device=PLACE)
        return whole.tril(num_keys - num_queries)

    attention.causal_lower_right = mask


def _adapt_megatron_core() -> None:
    """Random states by name; and gradient reduction coalesces collectives, which has no fake."""
    from megatron.core.distributed import param_and_grad_buffer
    from megatron.core.tensor_parallel import random

    random._get_cuda_rng_state = lambda *unused, **more: torch.zeros(16, dtype=torch.uint8)
    random._set_cuda_rng_state = lambda *unused, **more: None
    param_and_grad_buffer._coalescing_manager = lambda *unused, **more: contextlib.nullcontext(
        Stream()
    )


@contextlib.contextmanager
def fake_ranks(rank: int, world_size: int) -> Iterator[None]:
    """Process groups of which this is one rank, and the others never answer nor are waited for."""
    original = dist.new_group, dist.all_gather_object

    def new_group(ranks: Any = None, *unused: Any, **more: Any) -> Any:
        return original[0](ranks, backend="fake")

    def all_gather_object(gathered: list, mine: Any, group: Any = None) -> None:
        gathered[:] = [mine] * len(gathered)

    dist.new_group, dist.all_gather_object = new_group, all_gather_object
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.new_group, dist.all_gather_object = original
        dist.destroy_process_group()
