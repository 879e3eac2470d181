"""The report of `tools/doctor.py`: what is installed, what a run would use here, and why.

Also reports the defaults of megatron-core that depend on installed libraries, not on settings. Not
covered: whether a run's data and checkpoints exist.
"""

import dataclasses
import importlib
import platform
from collections.abc import Iterator
from typing import Any

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.errors import BackendError
from megatron_ponder.installation import LOADING_ERRORS, problems
from megatron_ponder.runtime.backends import choose_backends, describe
from megatron_ponder.runtime.capabilities import Capabilities, Library

DEFAULTS = {
    # description: module of megatron-core, name in it
    "Adam": ("megatron.core.optimizer", "Adam"),
    "gradient clipping": ("megatron.core.optimizer.clip_grads", "multi_tensor_scale_impl"),
    "norms of its own specs": ("megatron.core.models.gpt.gpt_layer_specs", "LNImpl"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Flags of tools/doctor.py."""

    json: bool = False
    """Print one JSON object instead of text."""


def diagnose(config: ResolvedConfig, found: Capabilities) -> dict[str, object]:
    """The whole report, as plain data.

    Args:
        config: resolved settings of a run.
        found: what the machine has.
    """
    report: dict[str, object] = {
        "python": platform.python_version(),
        "found": _found(found),
        "problems": [*problems()],
        "megatron_core_takes": dict(_defaults()),
        "warnings": [*_warnings(config, found)],
    }
    try:
        backends = choose_backends(config, found)
    except BackendError as error:
        return report | {"refused": str(error)}
    chosen = {
        setting: {"chosen": choice, "why": backends.reasons[setting]}
        for setting, choice in describe(backends).items()
    }
    return report | {"chosen": chosen}


def as_text(report: dict[str, Any]) -> str:
    """The report as text."""
    lines = [f"Python {report['python']}", "", "Found:"]
    lines += [f"  {name}: {what}" for name, what in report["found"].items()]
    lines += ["", "Defaults of megatron-core, given what is installed:"]
    lines += [f"  {name}: {what}" for name, what in report["megatron_core_takes"].items()]
    if report["problems"]:
        lines += ["", "Nothing can run before these are mended:"]
        lines += [f"  - {problem}" for problem in report["problems"]]
    elif "refused" in report:
        lines += ["", f"A run with these settings would be refused: {report['refused']}"]
    else:
        lines += ["", "A run with these settings would use:"]
        lines += [
            f"  --{name.replace('_', '-')}: {choice['chosen']} ({choice['why']})"
            for name, choice in report["chosen"].items()
        ]
    lines += [f"\nNote: {warning}" for warning in report["warnings"]]
    return "\n".join(lines)


def _found(found: Capabilities) -> dict[str, str]:
    """Device and libraries, each with its version or its problem."""
    device = found.device_name or "none; everything runs on the CPU"
    if found.compute_capability is not None:
        device += f", compute capability {'.'.join(map(str, found.compute_capability))}"
    no_cuda = "none without CUDA"
    return {
        "CUDA device": device,
        "torch": f"{found.torch}, CUDA {found.cuda or 'none'}",
        "cuDNN": found.cudnn or no_cuda,
        "torch's attention on cuDNN": found.attends_with_cudnn or "runs",
        "NCCL": found.nccl or no_cuda,
        "megatron-core": found.megatron_core,
        "TransformerEngine": _state(found.transformer_engine),
        "apex": _state(found.apex),
        "apex's weight gradients": _state(found.apex_weight_gradient),
        "Triton": _state(found.triton) + _interpreter(found),
        "flash-attn": _state(found.flash_attention),
    }


def _state(library: Library) -> str:
    """Version and problem of a library."""
    if library.version is None:
        return library.problem or "unknown"
    return library.version if library.problem is None else f"{library.version}, {library.problem}"


def _interpreter(found: Capabilities) -> str:
    """A note if Triton runs in its interpreter."""
    return ", in its interpreter (TRITON_INTERPRET is set)" if found.interprets_triton else ""


def _defaults() -> Iterator[tuple[str, str]]:
    """The implementations that megatron-core has bound its names to."""
    for what, (module_name, name) in DEFAULTS.items():
        try:
            value = vars(importlib.import_module(module_name)).get(name)
        except LOADING_ERRORS as error:
            yield what, f"unknown, megatron-core cannot be imported: {error}"
            continue
        if value is None:
            yield what, "not in this version"
        else:
            origin = getattr(value, "__module__", None) or type(value).__module__
            yield what, f"{origin}.{getattr(value, '__name__', name)}"


def _warnings(config: ResolvedConfig, found: Capabilities) -> Iterator[str]:
    """Notes about slow or unexpected choices."""
    if not found.has_cuda:
        yield (
            "there is no CUDA device. Training runs on the CPU with the reference implementation: "
            "composed torch kernels, megatron-core's layers, torch's attention and fused AdamW, "
            "gloo between ranks."
        )
    if found.transformer_engine.is_usable:
        yield (
            "TransformerEngine is installed, so megatron-core uses its Adam and clipping whatever "
            "--transformer-impl is. This costs a device synchronisation per step, for the gradient "
            "norm. torch's AdamW, used without TransformerEngine and apex, avoids it."
        )
    if found.has_cuda and not config.training.bf16:
        yield "this report is for an fp32 run; add --bf16 for a bf16 run."
