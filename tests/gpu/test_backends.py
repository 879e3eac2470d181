"""Compiled kernels and accelerated backends against the reference, on a GPU.

Has not run on any GPU yet. The CPU twins are tests/parity/test_kernels.py (Triton's interpreter),
tests/parity/test_weight_gradient.py and tests/unit/runtime/test_backends.py; the kernels one by one
are tests/unit/kernels, which use the GPU where there is one.
"""

import pytest
import torch

from megatron_ponder.runtime.capabilities import find_capabilities
from tests.parity.layouts import batch, config_of, prepare_checkpoints
from tests.parity.measure import measure
from tests.parity.tolerances import BF16_LOSS_ABSOLUTE, largest_difference, violations
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device"),
]
NEEDS_TE = pytest.mark.skipif(
    not find_capabilities().transformer_engine.is_usable, reason="TransformerEngine is missing"
)
MODELS = ["llama k2", "neox k1", "gpt2 k1"]
REFERENCE = {"kernels": "torch", "transformer_impl": "local", "attention_backend": "sdpa"}
TE = {"transformer_impl": "transformer_engine"}
FUSED_GRADIENTS = {"gradient_accumulation_fusion": True}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    prepare_checkpoints(folder)
    return str(folder)


def measured(model, settings, folder, num_steps=3):
    config = config_of(model, settings, 1)
    return run_ranks(measure, 1, config, f"{folder}/{model}", batch(), num_steps)[0]


@pytest.mark.parametrize("model", MODELS)
def test_kernels_in_fp32(model, checkpoints):
    triton = {"kernels": "triton", "cross_entropy_loss_fusion": True} | FUSED_GRADIENTS
    found = measured(model, triton, checkpoints)
    assert not violations(found, measured(model, REFERENCE, checkpoints))


@NEEDS_TE
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("gradients", [{}, FUSED_GRADIENTS], ids=["composed", "fused"])
def test_transformer_engine_in_fp32(model, gradients, checkpoints):
    """From a checkpoint of local layers, with the local attention: every gradient of every pass."""
    found = measured(model, TE | {"attention_backend": "sdpa"} | gradients, checkpoints)
    assert not violations(found, measured(model, REFERENCE, checkpoints))


@NEEDS_TE
@pytest.mark.parametrize("settings", [TE, TE | FUSED_GRADIENTS, {"attention_backend": "te"}])
def test_transformer_engine_in_bf16(settings, checkpoints):
    bf16 = {"bf16": True}
    found = measured("llama k2", settings | bf16, checkpoints).losses
    expected = measured("llama k2", REFERENCE | bf16, checkpoints).losses
    difference = largest_difference(torch.tensor(found), torch.tensor(expected))
    assert difference <= BF16_LOSS_ABSOLUTE


@NEEDS_TE
@pytest.mark.skipif(not find_capabilities().has_fp8, reason="this device has no fp8")
def test_fp8_learns_one_batch(checkpoints):
    shape = {"bf16": True, "fp8_format": "hybrid", "kv_channels": 16}
    config = config_of("neox k1", shape, 1)
    from tests.parity.test_bf16 import losses_in_bf16

    (losses,) = run_ranks(losses_in_bf16, 1, config)
    assert losses[-1] < losses[0] - 0.5
