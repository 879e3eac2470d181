"""Devices are not mixed up, and a training step never waits: seen without a GPU.

The package runs on tensors that know their device and have no contents (device.py), which needs a
torch built for CUDA, as PyPI's is, and a C compiler for the driver's stand-in. Where there is a
GPU, tests/gpu runs the real thing.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")
TIMEOUT_S = 300

pytestmark = [
    pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here: see tests/gpu"),
    pytest.mark.skipif(COMPILER is None, reason="no C compiler for the driver's stand-in"),
]

FORWARDS = ["forward and backward", "evaluation"]
TRAINING = [*FORWARDS, "update"]
BF16 = {"bf16": True}
TORCH = {"kernels": "torch"}
FUSED = {"cross_entropy_loss_fusion": True, "gradient_accumulation_fusion": True}
PASS = {"recompute_granularity": "pass"}
SELECTIVE = {"recompute_granularity": "selective"}
LAYER = {"recompute_granularity": "full"}
DROPOUT = {"hidden_dropout": 0.1, "attention_dropout": 0.1}
SEQUENCE_PARALLEL = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
CONTEXT_PARALLEL = {"context_parallel_size": 2}
PIPELINE = {"pipeline_model_parallel_size": 2}
DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAP = DISTRIBUTED | {"overlap_grad_reduce": True, "overlap_param_gather": True}
SINGLE = [
    ("llama k2", BF16 | FUSED | PASS),
    ("neox k1", BF16 | FUSED | LAYER),
    ("gpt2 k1", BF16 | TORCH | FUSED | DROPOUT),
    ("neox ponderlm of 5", BF16 | TORCH),
    ("llama loop", BF16 | SELECTIVE),
    ("gpt2 pause", BF16),
]
SHARED = [
    ("llama k2", BF16 | FUSED | SEQUENCE_PARALLEL | CONTEXT_PARALLEL, 4, 3),
    ("neox ponderlm of 5", BF16 | PIPELINE, 2, 1),
    ("gpt2 k1", BF16 | OVERLAP, 2, 1),
]


def case(model, settings, world_size=1, rank=0, parts=TRAINING, fault=None):
    return {
        "model": model,
        "settings": settings,
        "world_size": world_size,
        "rank": rank,
        "parts": parts,
        "fault": fault,
    }


FAULTS = [
    case("llama k1", BF16 | {"kernels": kernels}, parts=FORWARDS, fault="rotary table on the CPU")
    for kernels in ("torch", "triton")
]
WAITS = [
    case("llama k1", BF16, parts=FORWARDS, fault=fault)
    for fault in ("reads a number", "copies to the device")
]
CASES = [
    *(case(*single, parts=[*TRAINING, "generation"]) for single in SINGLE),
    *(case(*shared) for shared in SHARED),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """All cases, in one process in which torch finds the stand-in for the driver."""
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    subprocess.run([COMPILER, "-shared", "-fPIC", "-o", library, FOLDER / "driver.c"], check=True)
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "RANK")}
    cases = [*CASES, *FAULTS, *WAITS]
    done = subprocess.run(
        [sys.executable, "-m", "tests.fake_cuda.dry_run", json.dumps(cases)],
        cwd=FOLDER.parents[1],
        env=environment | {"LD_PRELOAD": str(library), "LD_LIBRARY_PATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    return {str(case): result for case, result in zip(cases, results, strict=True)}


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['model']} {c['settings']}")
def test_no_mixed_devices_and_no_waits(case, found):
    """Models and settings on a single rank, and ranks of several."""
    assert list(found[str(case)]) == case["parts"]
    for part, seen in found[str(case)].items():
        assert seen["problem"] is None, f"{part}: {seen['problem']}"
        assert part == "generation" or not seen["waits"], f"{part}: {seen['waits']}"


@pytest.mark.parametrize("case", FAULTS, ids=lambda c: c["settings"]["kernels"])
def test_a_misplaced_tensor_is_found(case, found):
    for part in FORWARDS:
        assert "cpu" in (found[str(case)][part]["problem"] or "")


@pytest.mark.parametrize("case", WAITS, ids=lambda c: c["fault"])
def test_a_wait_is_found(case, found):
    for part in FORWARDS:
        waits = found[str(case)][part]["waits"]
        assert waits and all(w.startswith(f"{case['fault']} at tests/fake_cuda") for w in waits)
