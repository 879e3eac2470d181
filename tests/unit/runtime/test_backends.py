"""Choices of backends from what is asked for and what is there; and what this machine has."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import BackendError
from megatron_ponder.runtime.backends import Backends, choose_backends
from megatron_ponder.runtime.capabilities import Capabilities, Library, find_capabilities
from megatron_ponder.runtime.diagnosis import as_text, diagnose

ROOT = Path(__file__).parents[3]
CPU = Capabilities(torch="2.13.0", megatron_core="0.16.1")
H100 = dataclasses.replace(
    CPU,
    device_name="H100",
    compute_capability=(9, 0),
    attends_with_cudnn=None,
    triton=Library(version="3.6", problem=None),
)
TE = Library(version="2.11", problem=None)
BARE_APEX = Library(version="0.1", problem="built without its CUDA parts (amp_C)")


def choose(found: Capabilities, **settings: object) -> Backends:
    return choose_backends(RunConfig().replaced(**settings), found)


def test_a_cpu_gets_the_reference() -> None:
    backends = choose(CPU)
    assert (backends.kernels, backends.transformer_impl) == ("torch", "local")
    assert (backends.attention, backends.sdpa_order) == ("sdpa", ())
    assert backends.weight_gradient == "none"


def test_auto_on_hopper() -> None:
    backends = choose(H100, bf16=True)
    assert (backends.kernels, backends.transformer_impl) == ("triton", "local")
    assert backends.sdpa_order[0] == "cudnn"


def test_cudnn_is_left_out_with_a_reason() -> None:
    broken = dataclasses.replace(H100, attends_with_cudnn="no plan")
    for found, reason in (
        (broken, "not cudnn: no plan"),
        (dataclasses.replace(H100, compute_capability=(8, 0)), "only on Hopper and later"),
    ):
        backends = choose(found)
        assert "cudnn" not in backends.sdpa_order and "flash" in backends.sdpa_order
        assert reason in backends.reasons["attention_backend"]


def test_auto_takes_transformer_engine_for_fp8_only() -> None:
    found = dataclasses.replace(H100, transformer_engine=TE)
    assert choose(found, bf16=True).transformer_impl == "local"
    backends = choose(found, bf16=True, fp8_format="hybrid", gradient_accumulation_fusion=True)
    assert (backends.transformer_impl, backends.attention) == ("transformer_engine", "te")
    assert backends.weight_gradient == "transformer_engine"


@pytest.mark.parametrize(
    "has_te, settings, attention",
    [
        (True, {"bf16": True}, "te"),
        (True, {"bf16": True, "context_parallel_attention": "gather"}, "sdpa"),
        (True, {}, "sdpa"),
        (False, {"bf16": True}, "sdpa"),
        (True, {"bf16": True, "context_parallel_attention": "transformer_engine"}, "te"),
    ],
)
def test_attention_over_shared_sequences(has_te, settings, attention) -> None:
    found = dataclasses.replace(H100, transformer_engine=TE if has_te else Library())
    assert choose(found, context_parallel_size=2, **settings).attention == attention


def test_weight_gradients_by_apex_else_by_torch() -> None:
    fused = {"gradient_accumulation_fusion": True}
    assert choose(CPU, **fused).weight_gradient == "torch"
    found = dataclasses.replace(H100, apex_weight_gradient=Library(version="1", problem=None))
    assert choose(found, **fused).weight_gradient == "apex"


REFUSED = [
    (CPU, {"kernels": "triton"}, "--kernels triton: Triton not installed"),
    (H100, {"transformer_impl": "transformer_engine"}, "TransformerEngine not installed"),
    (H100, {"attention_backend": "flash"}, "flash-attn not installed"),
    (H100, {"attention_backend": "te", "bf16": True}, "--attention-backend te"),
    (
        dataclasses.replace(H100, transformer_engine=TE),
        {"attention_backend": "te"},
        "te needs --bf16",
    ),
    (
        dataclasses.replace(H100, transformer_engine=TE, compute_capability=(8, 0)),
        {"fp8_format": "e4m3", "bf16": True},
        "has no fp8 matmul",
    ),
    (
        H100,
        {"context_parallel_size": 2, "context_parallel_attention": "transformer_engine"},
        "Use auto or gather",
    ),
    (dataclasses.replace(H100, apex=BARE_APEX), {}, "Uninstall apex"),
]


@pytest.mark.parametrize("found, settings, message", REFUSED)
def test_what_is_asked_for_and_missing_is_refused(found, settings, message) -> None:
    with pytest.raises(BackendError, match=message):
        choose(found, **settings)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(BackendError) as error:
        choose(CPU, kernels="triton", transformer_impl="transformer_engine")
    assert "--kernels" in str(error.value) and "--transformer-impl" in str(error.value)


def test_bare_apex_is_harmless_beside_transformer_engine() -> None:
    choose(dataclasses.replace(H100, apex=BARE_APEX, transformer_engine=TE))


def test_diagnosis_notes_the_device_synchronisation_of_transformer_engine() -> None:
    """With TransformerEngine's Adam the host reads the gradient norm; with torch's it does not."""
    waits = "a device synchronisation per step"
    assert waits not in as_text(diagnose(RunConfig(), H100))
    found = dataclasses.replace(H100, transformer_engine=TE)
    assert waits in as_text(diagnose(RunConfig(), found))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_this_machine_has_no_gpu() -> None:
    found = find_capabilities()
    assert not found.has_cuda and found.torch == torch.__version__
    assert not found.transformer_engine.is_usable and not found.flash_attention.is_usable


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_doctor() -> None:
    """As a user runs it, outside of Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "tools/doctor.py", "--json", "--kernels", "triton"]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert "--kernels triton: Triton needs a CUDA device" in report["refused"]
    assert "everything runs on the CPU" in report["found"]["CUDA device"]
    assert "AdamW" in report["megatron_core_takes"]["Adam"]
