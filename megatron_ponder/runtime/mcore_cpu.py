"""Makes megatron-core run without CUDA. The only file that patches it; it does nothing on CUDA.

megatron-core (0.16.1 to 0.19.x) requires CUDA in a few fixed places: buffers created with
`device="cuda"`, the current device, streams, the CUDA random generator, and tensor type names. Each
patch below redirects one kind of place to the CPU and documents what it replaces. No patch changes
a computation. A CPU run executes megatron-core's own code, and is the reference that every
accelerated path must match.
"""

import contextlib
import functools
import importlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

CPU = torch.device("cpu")

# Modules that create tensors with device="cuda" in code that a CPU run reaches.
MODULES_WITH_CUDA_FACTORIES = (
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.optimizer.grad_scaler",
    "megatron.core.optimizer.distrib_optimizer",
    "megatron.core.distributed.param_and_grad_buffer",
    "megatron.core.transformer.utils",
    "megatron.core.utils",
    "megatron.core.dist_checkpointing.strategies.state_dict_saver",
    "megatron.core.dist_checkpointing.exchange_utils",
)
FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like")


def apply() -> None:
    """Patch megatron-core for CPU. Does nothing on a machine with CUDA, or when called again."""
    if torch.cuda.is_available() or isinstance(torch.cuda.current_device, _Patched):
        return
    _patch_cuda_runtime()
    _patch_tensor_methods()
    for name in MODULES_WITH_CUDA_FACTORIES:
        module = importlib.import_module(name)
        setattr(module, "torch", _torch_with(**{f: _on_cpu(getattr(torch, f)) for f in FACTORIES}))
    _patch_random_state()


class _Patched:
    """A callable that marks a patch of this file."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


class _NoStream:
    """Replaces a CUDA stream. On CPU everything runs in program order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        """Do nothing: everything runs in program order."""

    def synchronize(self) -> None:
        """Do nothing: no work is pending."""


def _patch_cuda_runtime() -> None:
    """Replace `torch.cuda` functions that raise without a driver.

    current_device: megatron-core passes it as `device=` of gathered and scattered buffers
    (tensor_parallel.mappings, layers) and of gradient buffers. The others are barriers and streams
    (0.19 enters streams in param_and_grad_buffer even if nothing overlaps).
    """
    cuda: Any = torch.cuda
    cuda.current_device = _Patched(lambda: CPU)
    for barrier in ("synchronize", "set_device", "empty_cache"):
        setattr(cuda, barrier, _Patched(lambda *args, **kwargs: None))
    cuda.Stream = _NoStream
    cuda.current_stream = _Patched(lambda *args, **kwargs: _NoStream())
    cuda.default_stream = _Patched(lambda *args, **kwargs: _NoStream())
    cuda.stream = _Patched(lambda stream: contextlib.nullcontext())


def _patch_tensor_methods() -> None:
    """Replace `Tensor.type()` and `Tensor.cuda()`.

    megatron-core's optimizers sort parameters by `param.type() == "torch.cuda.FloatTensor"`, and
    clip_grads asserts it. Their checkpoint code moves tensors with `.cuda()`.
    """
    original_type = torch.Tensor.type

    @functools.wraps(original_type)
    def type_as_on_cuda(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original_type(self, *args, **kwargs)
        is_name = isinstance(answer, str) and not answer.startswith("torch.cuda.")
        return answer.replace("torch.", "torch.cuda.", 1) if is_name else answer

    tensor: Any = torch.Tensor
    tensor.type = type_as_on_cuda
    tensor.cuda = lambda self, *args, **kwargs: self


def _patch_random_state() -> None:
    """Replace the CUDA generator by the CPU generator in `tensor_parallel.random`.

    Its tracker gives tensor-parallel regions their own stream of random numbers: it saves and
    restores the state of the CUDA generator. Dropout on CPU draws from the CPU generator, so the
    tracker must save and restore that one.
    """
    module: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    generator = torch.default_generator

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return generator.get_state()

    def set_state(new_state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        generator.set_state(new_state)

    def manual_seed(seed: int) -> None:
        generator.manual_seed(seed)

    module._get_cuda_rng_state = get_state
    module._set_cuda_rng_state = set_state
    cuda = _Delegate(
        torch.cuda, get_rng_state=get_state, set_rng_state=set_state, manual_seed=manual_seed
    )
    module.torch = _torch_with(cuda=cuda)


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a tensor factory, so that it creates tensors for CUDA on the CPU."""

    @functools.wraps(factory)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.get("device")
        if wanted is not None and torch.device(wanted).type == "cuda":
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return wrapped


class _Delegate(types.ModuleType):
    """A module with some names replaced; all others are looked up in the original."""

    def __init__(self, original: types.ModuleType, **replaced: Any) -> None:
        super().__init__(original.__name__)
        self.__dict__.update(replaced)
        self._original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __dir__(self) -> Iterator[str]:
        return iter(dir(self._original))


def _torch_with(**replaced: Any) -> _Delegate:
    """`torch` with some names replaced, for the globals of one module."""
    return _Delegate(torch, **replaced)
