"""What to run on a GPU that one has for an hour: commands in order of importance, and targets.

Left out: running them (gpu_report.py), and more than one GPU.
"""

import dataclasses
import sys
from pathlib import Path

LARGE_MEMORY_GIB = 120
"""From here on (H200, B200) the largest micro-batch is tried first, below it the second."""
MICROBATCHES_PER_STEP = 4

MODELS = {"410m": ("llama-410m", (8, 4, 2, 1)), "1.4b": ("llama-1.4b", (4, 2, 1))}
"""Preset, and micro-batch sizes to try."""
MFU, FP8_MFU, SPEEDUP = "MFU", "MFU with fp8 linears", "tokens/s over the reference's"
TARGETS = {
    "410m": {MFU: 0.40, FP8_MFU: 0.45, SPEEDUP: 1.4},
    "1.4b": {MFU: 0.50, FP8_MFU: 0.60, SPEEDUP: 1.3},
}
"""MFU is over the device's dense bf16 peak; the reference is the method on stock layers."""
TE = "--transformer-impl transformer_engine"
BACKENDS = {
    "te": TE,
    "fp8": f"{TE} --fp8-format hybrid",
    "torch-kernels": "--kernels torch",
    "selective": "--recompute-granularity selective",
    "fused-loss": "--cross-entropy-loss-fusion",
    "fused-gradients": "--gradient-accumulation-fusion",
    "flash-attention": "--attention-backend flash",
}
"""Our side with other backends."""
RUN = "--seq-length 2048 --num-latent-thoughts 1 --num-jacobi-iterations 2 --bf16"
TINY_RUN = (
    "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --vocab-size 64 --seq-length 16 "
    "--num-jacobi-iterations 1 --bf16 --micro-batch-size 1"
)


@dataclasses.dataclass(frozen=True)
class Step:
    """One command."""

    name: str
    minutes: float
    """Expected."""
    commands: list[list[str]]
    """To run; each later one only if the one before ran out of memory."""


def build_steps(folder: Path, memory_gib: float, is_tiny: bool) -> list[Step]:
    """All steps, the most important first.

    Args:
        folder: of the report.
        memory_gib: of the device; 0: unknown.
        is_tiny: shapes that a CPU computes in seconds.
    """
    once = ["--rounds", "1", "--steps", "1", "--warmup-steps", "1"] if is_tiny else []
    short = ["--prompt-tokens", "8", "--new-tokens", "4"] if is_tiny else []

    def bench(name: str, minutes: float, command: str, model: str, *more: str) -> Step:
        """A command of tools/benchmark.py, once for each micro-batch size to try."""
        preset, sizes = MODELS[model]
        runs = [
            f"--preset {preset} {RUN} --micro-batch-size {size} --global-batch-size "
            f"{size * MICROBATCHES_PER_STEP}"
            for size in sizes[0 if memory_gib >= LARGE_MEMORY_GIB else 1 :]
        ]
        tool = [sys.executable, "tools/benchmark.py", command]
        files = ["--record", str(folder / f"parts/{name}.json"), *more]
        tried = [TINY_RUN] if is_tiny else runs
        return Step(name, minutes, [[*tool, *run.split(), *files] for run in tried])

    def train(model: str) -> Step:
        trace = ["--roofline", "--profile", str(folder / f"trace-{model}.json.gz")]
        return bench(f"train-{model}", 8, "train", model, *once, *trace)

    def variant(backend: str, model: str) -> Step:
        more = ["--baseline", "none", *BACKENDS[backend].split()]
        return bench(f"train-{model}-{backend}", 3, "train", model, *once, *more)

    python = sys.executable
    return [
        Step("machine", 1, [[python, "-m", "torch.utils.collect_env"]]),
        Step("doctor", 1, [[python, "tools/doctor.py", "--bf16"]]),
        Step("tests", 5, [[python, "-m", "pytest", "-q", "-rs", "tests/gpu"]]),
        *(train(model) for model in MODELS),
        *(variant(backend, model) for backend in ("te", "fp8") for model in MODELS),
        *(bench(f"kernels-{model}", 2, "kernels", model) for model in MODELS),
        *(variant(b, model) for b in BACKENDS if b not in ("te", "fp8") for model in MODELS),
        *(bench(f"checkpoint-{m}", 3, "checkpoint", m, "--saves", "2") for m in MODELS),
        bench("generate-410m", 3, "generate", "410m", *short),
    ]
