"""Detects what this machine has: devices, and libraries that exist on GPU clusters only.

Only this module looks for CUDA, TransformerEngine, apex, Triton and flash-attn, and only this
module imports TransformerEngine and apex to check that they work. If they are installed,
megatron-core imports them too, whatever the settings of the run, and changes its defaults.
`find_capabilities` looks once. `runtime.backends` chooses the backends from its result.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_ponder.installation import loading_error

NOT_INSTALLED = "not installed"
NEEDS_CUDA = "needs a CUDA device"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Library:
    """State of a library that may be installed."""

    version: str | None = None
    """None: not installed."""
    problem: str | None = NOT_INSTALLED
    """Reason why it cannot be used here; None: it can."""

    @property
    def is_usable(self) -> bool:
        """Whether it can be used."""
        return self.problem is None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Capabilities:
    """Everything that the choice of backends depends on. Frozen, so that the choice is pure."""

    torch: str
    """torch's version."""
    megatron_core: str
    """megatron-core's version."""
    device_name: str | None = None
    """Name of the CUDA device of this rank; None: there is none."""
    compute_capability: tuple[int, int] | None = None
    """Compute capability of that device; Hopper is (9, 0)."""
    cuda: str | None = None
    """CUDA version that torch was built for."""
    cudnn: str | None = None
    """Version of the cuDNN that torch loaded."""
    nccl: str | None = None
    """Version of the NCCL that torch was built with."""
    attends_with_cudnn: str | None = NEEDS_CUDA
    """Reason why torch's attention cannot use cuDNN; None: a small test ran."""
    transformer_engine: Library = Library()
    apex: Library = Library()
    apex_weight_gradient: Library = Library()
    """apex's module that accumulates weight gradients inside the GEMM."""
    triton: Library = Library()
    interprets_triton: bool = False
    """Whether TRITON_INTERPRET is set, so that kernels run in Triton's interpreter (CPU tests)."""
    flash_attention: Library = Library()

    @property
    def has_cuda(self) -> bool:
        """Whether there is a CUDA device."""
        return self.device_name is not None

    @property
    def has_fp8(self) -> bool:
        """Whether the device has fp8 matmuls (Ada, Hopper and later)."""
        return self.compute_capability is not None and self.compute_capability >= (8, 9)


@functools.cache
def find_capabilities() -> Capabilities:
    """Detect the capabilities of this process's machine; cached after the first call."""
    on_cpu = Capabilities(
        torch=torch.__version__,
        megatron_core=_megatron_core(),
        triton=_triton(),
        interprets_triton=_interprets_triton(),
        transformer_engine=_imported("transformer_engine", "transformer_engine.pytorch"),
        apex=_apex(),
        apex_weight_gradient=_imported("apex", "fused_weight_gradient_mlp_cuda"),
        flash_attention=_imported("flash_attn", "flash_attn"),
    )
    if not torch.cuda.is_available():
        return on_cpu
    version = torch.backends.cudnn.version()
    return dataclasses.replace(
        on_cpu,
        device_name=torch.cuda.get_device_name(),
        compute_capability=torch.cuda.get_device_capability(),
        cuda=torch.version.cuda,
        cudnn=None if version is None else str(version),
        nccl=".".join(map(str, torch.cuda.nccl.version())),
        attends_with_cudnn=_problem_of_cudnn_attention(),
    )


def _megatron_core() -> str:
    """Its version, or that it is missing, which only tools/doctor.py lives to tell."""
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def _interprets_triton() -> bool:
    """Whether TRITON_INTERPRET is set, by the same rule as in Triton."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _triton() -> Library:
    """State of Triton, which is usable on CUDA, and anywhere in its interpreter."""
    if importlib.util.find_spec("triton") is None:
        return Library()
    usable = torch.cuda.is_available() or _interprets_triton()
    return Library(version=_version_of("triton"), problem=None if usable else NEEDS_CUDA)


def _apex() -> Library:
    """State of apex. A build without its CUDA parts counts as not usable."""
    found = _imported("apex", "apex.optimizers")
    if not found.is_usable:
        return found
    parts = _imported("apex", "amp_C")
    if parts.is_usable:
        return found
    return Library(version=found.version, problem="built without its CUDA parts (amp_C)")


def _imported(package: str, module: str) -> Library:
    """State of a library, usable with CUDA if `module` can be imported."""
    if importlib.util.find_spec(package) is None:
        return Library()
    version = _version_of(package)
    if not torch.cuda.is_available():
        module = package  # its parts need CUDA
    error = loading_error(module)
    if error is not None:
        return Library(version=version, problem=f"import of {module} fails: {error}")
    return Library(version=version, problem=None if torch.cuda.is_available() else NEEDS_CUDA)


def _version_of(package: str) -> str:
    """Version of the distribution that contains a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # Under another name. This reads the file lists of every installed distribution (0.5 s).
        names = importlib.metadata.packages_distributions().get(package, [])
        return importlib.metadata.version(names[0]) if names else "unknown"


def _problem_of_cudnn_attention() -> str | None:
    """Run torch's attention on cuDNN; return its error, or None.

    A trial run is needed, because a mismatched cuDNN loads and fails only later.
    """
    shape = (1, 2, 128, 64)
    query = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    try:
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION]):
            F.scaled_dot_product_attention(query, query, query, is_causal=True).sum().backward()
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None
