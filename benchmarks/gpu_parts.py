"""What is run on a GPU that one has for an hour: commands in order of importance, and the targets.

Data only: `gpu_report` runs the parts, `gpu_findings` writes down what they found. Imports no
torch. Left out: more than one GPU.
"""

import dataclasses
import sys
from collections.abc import Iterator

LARGE_MEMORY_GIB = 120
"""From here on (H200, B200) the larger micro-batches are tried."""
MICROBATCHES_PER_STEP = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What the project wants of a model."""

    mfu: float
    """Of the device's dense bf16 peak, with bf16 linears."""
    fp8_mfu: float
    """The same with fp8 linears."""
    speedup: float
    """Tokens per second, over those of the method on stock transformers layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """A model that is trained."""

    preset: str
    target: Target
    micro_batches: tuple[int, ...]
    """To try on a device with much memory, from the largest; on others from the second."""


MODELS = {
    "410m": Model(
        preset="llama-410m",
        target=Target(mfu=0.40, fp8_mfu=0.45, speedup=1.4),
        micro_batches=(8, 4, 2, 1),
    ),
    "1.4b": Model(
        preset="llama-1.4b",
        target=Target(mfu=0.50, fp8_mfu=0.60, speedup=1.3),
        micro_batches=(4, 2, 1),
    ),
}
TE = ("--transformer-impl", "transformer_engine")
VARIANTS: dict[str, tuple[str, ...]] = {
    "te": TE,
    "fp8": (*TE, "--fp8-format", "hybrid"),
    "torch-kernels": ("--kernels", "torch"),
    "selective": ("--recompute-granularity", "selective"),
    "fused-loss": ("--cross-entropy-loss-fusion",),
    "fused-gradients": ("--gradient-accumulation-fusion",),
    "flash-attention": ("--attention-backend", "flash"),
}
"""Our side once more with other backends, by name."""

RUN = [
    "--seq-length",
    "2048",
    "--num-latent-thoughts",
    "1",
    "--num-jacobi-iterations",
    "2",
    "--bf16",
]
TINY_RUN = [
    "--num-layers",
    "1",
    "--hidden-size",
    "32",
    "--num-attention-heads",
    "2",
    "--vocab-size",
    "64",
    "--seq-length",
    "16",
    "--num-jacobi-iterations",
    "1",
    "--bf16",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One thing to find out, in a process of its own."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    """What to run; the later ones only where the one before ran out of memory."""
    minutes: float
    """About how long it takes."""
    prints_json: bool = True
    """Whether its stdout is a JSON object, or text."""


def build_parts(*, folder: str, is_tiny: bool, memory_gib: float | None) -> list[Part]:
    """All parts, the most important first.

    Args:
        folder: of the report, for traces.
        is_tiny: shapes that a CPU does in seconds, instead of the models.
        memory_gib: of the device; None: not known.
    """
    build = _Builder(folder, is_tiny, memory_gib)
    base = [build.train(name) for name in MODELS]
    variants = [
        build.train(name, variant)
        for variant in VARIANTS
        for name in (("410m",) if is_tiny else MODELS)
    ]
    important = ("te", "fp8")
    return [
        build.machine(),
        build.doctor(),
        build.tests(),
        *base,
        *(part for part in variants if part.name.endswith(important)),
        *(build.kernels(name) for name in MODELS),
        *(part for part in variants if not part.name.endswith(important)),
        *(build.checkpoint(name) for name in MODELS),
        build.generate("410m"),
    ]


class _Builder:
    """Commands for one kind of device."""

    def __init__(self, folder: str, is_tiny: bool, memory_gib: float | None) -> None:
        self._folder = folder
        self._is_tiny = is_tiny
        self._has_much_memory = memory_gib is not None and memory_gib >= LARGE_MEMORY_GIB

    def machine(self) -> Part:
        command = (sys.executable, "-m", "benchmarks.machine")
        return Part(name="machine", commands=(command,), minutes=self._minutes(1))

    def doctor(self) -> Part:
        command = (sys.executable, "tools/doctor.py", "--bf16")
        return Part(name="doctor", commands=(command,), minutes=self._minutes(1), prints_json=False)

    def tests(self) -> Part:
        command = (sys.executable, "-m", "pytest", "-q", "-rs", "tests/gpu")
        return Part(name="tests", commands=(command,), minutes=self._minutes(5), prints_json=False)

    def train(self, name: str, variant: str | None = None) -> Part:
        more = ["--rounds", "1", "--steps", "1", "--warmup-steps", "1"] if self._is_tiny else []
        if variant is None:
            trace = f"{self._folder}/trace-{name}.json.gz"
            more += ["--baseline", "reference", "--roofline", "--profile", trace]
        else:
            more += ["--baseline", "none", *VARIANTS[variant]]
        return Part(
            name=f"train-{name}" + (f"-{variant}" if variant else ""),
            commands=tuple(self._tried("train", name, more)),
            minutes=self._minutes(3 if variant else 8),
        )

    def kernels(self, name: str) -> Part:
        command = next(iter(self._tried("kernels", name, [])))
        return Part(name=f"kernels-{name}", commands=(command,), minutes=self._minutes(2))

    def checkpoint(self, name: str) -> Part:
        return Part(
            name=f"checkpoint-{name}",
            commands=tuple(self._tried("checkpoint", name, ["--saves", "2"])),
            minutes=self._minutes(3),
        )

    def generate(self, name: str) -> Part:
        more = ["--prompt-tokens", "8", "--new-tokens", "4"] if self._is_tiny else []
        command = next(iter(self._tried("generate", name, more)))
        return Part(name=f"generate-{name}", commands=(command,), minutes=self._minutes(3))

    def _tried(self, command: str, name: str, more: list[str]) -> Iterator[tuple[str, ...]]:
        """A command of tools/benchmark.py with one micro-batch size after the other."""
        model = MODELS[name]
        tool = (sys.executable, "tools/benchmark.py", command, "--json")
        if self._is_tiny:
            yield (*tool, *TINY_RUN, "--micro-batch-size", "1", *more)
            return
        for size in model.micro_batches[0 if self._has_much_memory else 1 :]:
            batch = (
                *("--micro-batch-size", str(size)),
                *("--global-batch-size", str(size * MICROBATCHES_PER_STEP)),
            )
            yield (*tool, "--preset", model.preset, *RUN, *batch, *more)

    def _minutes(self, minutes: float) -> float:
        return 0.5 if self._is_tiny else minutes
