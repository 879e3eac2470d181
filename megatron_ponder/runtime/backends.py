"""Chooses the implementations that a run uses, from its settings and from what the machine has.

`choose_backends` is a pure function of the two. A backend that is requested by name but cannot be
used is an error. Training logs the choices of `auto` once, with the reasons. `auto` never chooses
TransformerEngine's layers unless fp8 needs them, because they have not been measured against ours
yet.

megatron-core also chooses its own Adam and clipping if TransformerEngine or apex is installed.
`runtime.diagnosis` reports those choices.
"""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Literal

from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.errors import BackendError
from megatron_ponder.runtime.capabilities import Capabilities, Library, find_capabilities

logger = logging.getLogger(__name__)

HOPPER = (9, 0)
SDPA_BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}

Kernels = Literal["torch", "triton"]
TransformerImpl = Literal["local", "transformer_engine"]
Attention = Literal["sdpa", "flash", "te"]
WeightGradient = Literal["none", "apex", "torch", "transformer_engine"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backends:
    """The implementations that a run uses."""

    kernels: Kernels
    transformer_impl: TransformerImpl
    attention: Attention
    sdpa_order: tuple[str, ...]
    """Kernels that torch's attention may use, in order of preference; empty: torch chooses."""
    weight_gradient: WeightGradient
    """Library that accumulates weight gradients inside their GEMM; none: autograd, afterwards."""
    reasons: dict[str, str]
    """Reason for each choice, by setting."""


REFERENCE = Backends(
    kernels="torch",
    transformer_impl="local",
    attention="sdpa",
    sdpa_order=(),
    weight_gradient="none",
    reasons={},
)
"""Backends that work everywhere, for a model that is built but not run."""


def choose_backends(config: ResolvedConfig, found: Capabilities) -> Backends:
    """Choose the backends of a resolved run.

    Args:
        config: resolved.
        found: what the machine has.

    Raises:
        BackendError: backends that were requested by name cannot be used; one line each.
    """
    problems = [*_requests_that_fail(config, found)]
    if problems:
        raise BackendError(
            "a requested backend cannot be used here:\n  - " + "\n  - ".join(problems)
        )
    kernels, why_kernels = _kernels(config, found)
    layers, why_layers = _layers(config)
    attention, why_attention = _attention(config, found, layers)
    sdpa_order = _sdpa_order(found) if attention == "sdpa" else ()
    if sdpa_order:
        why_attention += f"; runs the first supported kernel of {', '.join(sdpa_order)}"
        if "cudnn" not in sdpa_order:
            why_attention += f" (not cudnn: {_why_not_cudnn(found)})"
    gradient, why_gradient = _weight_gradient(config, found, layers)
    return Backends(
        kernels=kernels,
        transformer_impl=layers,
        attention=attention,
        sdpa_order=sdpa_order,
        weight_gradient=gradient,
        reasons={
            "kernels": why_kernels,
            "transformer_impl": why_layers,
            "attention_backend": why_attention,
            "gradient_accumulation_fusion": why_gradient,
        },
    )


def _requests_that_fail(config: ResolvedConfig, found: Capabilities) -> Iterator[str]:
    """Requested backends that cannot be used, and an installation that would break any run."""
    backend, te = config.backend, found.transformer_engine
    if backend.kernels == "triton" and not found.triton.is_usable:
        yield f"--kernels triton: Triton {found.triton.problem}. Use auto or torch."
    if backend.transformer_impl == "transformer_engine" and not te.is_usable:
        yield (
            f"--transformer-impl transformer_engine: TransformerEngine {te.problem}. Use auto or "
            "local."
        )
    yield from _attention_that_fails(config, found)
    if backend.fp8_format is not None:
        if not te.is_usable:
            yield (
                f"--fp8-format {backend.fp8_format}: TransformerEngine {te.problem}. Leave it out."
            )
        elif not found.has_fp8:
            yield (
                f"--fp8-format {backend.fp8_format}: {found.device_name} has no fp8 matmul, which "
                "needs compute capability 8.9 or later. Leave it out."
            )
    if _breaks_megatron_core(found):
        yield (
            f"apex {found.apex.version} is {found.apex.problem}. megatron-core would use apex's "
            "Adam, which then fails. Uninstall apex, or build it with --cpp_ext and --cuda_ext, or "
            "install TransformerEngine, which takes precedence."
        )


def _breaks_megatron_core(found: Capabilities) -> bool:
    """Whether megatron-core would use an apex that imports but cannot work."""
    is_bare = found.apex.problem is not None and "without its CUDA parts" in found.apex.problem
    return is_bare and not found.transformer_engine.is_usable


def _attention_that_fails(config: ResolvedConfig, found: Capabilities) -> Iterator[str]:
    """Requested attention that cannot be used, including the one for context parallelism."""
    wanted = config.backend.attention_backend
    if wanted == "flash":
        if not found.flash_attention.is_usable:
            yield (
                f"--attention-backend flash: flash-attn {found.flash_attention.problem}. Use auto "
                "or sdpa."
            )
        elif not config.training.bf16:
            yield "--attention-backend flash needs --bf16. Use auto or sdpa."
    if wanted == "te" and not found.transformer_engine.is_usable:
        yield (
            f"--attention-backend te: TransformerEngine {found.transformer_engine.problem}. Use "
            "auto or sdpa."
        )
    if wanted == "te" and not config.training.bf16:
        yield "--attention-backend te needs --bf16: its kernels do not support fp32. Use sdpa."
    if _wants_ring(config) and not found.transformer_engine.is_usable:
        yield (
            "--context-parallel-attention transformer_engine: TransformerEngine "
            f"{found.transformer_engine.problem}. Use auto or gather."
        )


def _wants_ring(config: ResolvedConfig) -> bool:
    """Whether TransformerEngine's ring attention is requested, with more than one rank."""
    parallel = config.parallel
    is_requested = parallel.context_parallel_attention == "transformer_engine"
    return is_requested and parallel.context_parallel_size > 1


def _kernels(config: ResolvedConfig, found: Capabilities) -> tuple[Kernels, str]:
    wanted = config.backend.kernels
    if wanted != "auto":
        return wanted, "requested"
    if not found.has_cuda:
        return "torch", "no CUDA device; the composed form is the reference"
    if not found.triton.is_usable:
        return "torch", f"Triton {found.triton.problem}"
    return "triton", "there is a CUDA device, and Triton is installed"


def _layers(config: ResolvedConfig) -> tuple[TransformerImpl, str]:
    wanted = config.backend.transformer_impl
    if wanted != "auto":
        return wanted, "requested"
    if config.backend.fp8_format is not None:
        return "transformer_engine", "--fp8-format needs it"
    return "local", "TransformerEngine's layers are used only on request or with --fp8-format"


def _attention(
    config: ResolvedConfig, found: Capabilities, layers: TransformerImpl
) -> tuple[Attention, str]:
    wanted, parallel = config.backend.attention_backend, config.parallel
    has_te = found.transformer_engine.is_usable and config.training.bf16
    if _wants_ring(config):
        return "te", "--context-parallel-attention transformer_engine"
    if wanted != "auto":
        return wanted, "requested"
    if parallel.context_parallel_size > 1 and parallel.context_parallel_attention == "auto":
        if has_te:
            return "te", "its ring attention, for context parallelism"
        return "sdpa", "keys and values are gathered over ranks: ring attention needs " + (
            "--bf16"
            if found.transformer_engine.is_usable
            else f"TransformerEngine ({found.transformer_engine.problem})"
        )
    if layers == "transformer_engine" and has_te and parallel.context_parallel_size == 1:
        return "te", "used with TransformerEngine's layers"
    return "sdpa", "torch's attention"


def _sdpa_order(found: Capabilities) -> tuple[str, ...]:
    """Kernels of torch's attention, in the order in which they are tried."""
    if not found.has_cuda:
        return ()
    others = ("flash", "efficient", "math")
    return others if _why_not_cudnn(found) else ("cudnn", *others)


def _why_not_cudnn(found: Capabilities) -> str:
    """Reason for torch's attention not to use cuDNN; empty if it should."""
    assert found.compute_capability is not None
    if found.compute_capability < HOPPER:
        return "faster only on Hopper and later"
    return found.attends_with_cudnn or ""


def _weight_gradient(
    config: ResolvedConfig, found: Capabilities, layers: TransformerImpl
) -> tuple[WeightGradient, str]:
    if not config.backend.gradient_accumulation_fusion:
        return "none", "not requested"
    if layers == "transformer_engine":
        return "transformer_engine", "requested; TransformerEngine's layers have it"
    if found.apex_weight_gradient.is_usable:
        return "apex", "requested; apex has it"
    return "torch", f"requested; apex {_short(found.apex_weight_gradient)}"


def _short(library: Library) -> str:
    """Problem of a library, or its version."""
    return library.problem or f"{library.version}"


_pinned = ExitStack()


def pin_sdpa(order: tuple[str, ...]) -> None:
    """Restrict torch's attention to these kernels, in order of preference, for all later calls.

    Without this, torch silently chooses a slower kernel if cuDNN cannot be used.

    Args:
        order: names of SDPA_BACKENDS; empty: leave the choice to torch.
    """
    _pinned.close()
    if order:
        backends = [SDPA_BACKENDS[name] for name in order]
        _pinned.enter_context(sdpa_kernel(backends, set_priority=True))


def use_backends(config: ResolvedConfig) -> Backends:
    """Choose the backends of a run, and apply the process-wide settings.

    Raises:
        BackendError: see `choose_backends`.
    """
    backends = choose_backends(config, find_capabilities())
    pin_sdpa(backends.sdpa_order)
    return backends


def log_choices(backends: Backends) -> None:
    """Log each choice and its reason. Only training calls this; tools print only their results.

    `tools/doctor.py` reports the same for any settings.
    """
    for setting, choice in describe(backends).items():
        logger.info("%s: %s (%s)", setting, choice, backends.reasons[setting])


def describe(backends: Backends) -> dict[str, str]:
    """The choice for each setting."""
    return {
        "kernels": backends.kernels,
        "transformer_impl": backends.transformer_impl,
        "attention_backend": backends.attention,
        "gradient_accumulation_fusion": backends.weight_gradient,
    }
