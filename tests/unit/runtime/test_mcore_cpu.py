"""The patches: present without CUDA, applied once, absent with it, and confined to their file."""

import re
from pathlib import Path

import pytest
import torch

import megatron_ponder
from megatron_ponder.runtime import mcore_cpu

PACKAGE = Path(megatron_ponder.__file__).parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="the patches do nothing on CUDA")
def test_idempotent_and_effective():
    mcore_cpu.apply()
    current_device, tensor_type = torch.cuda.current_device, torch.Tensor.type
    mcore_cpu.apply()
    assert torch.cuda.current_device is current_device
    assert torch.Tensor.type is tensor_type
    assert torch.cuda.current_device() == torch.device("cpu")
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"
    assert torch.ones(1).type(torch.int64).dtype == torch.int64
    tensor = torch.ones(1)
    assert tensor.cuda() is tensor


def test_nothing_with_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", before := object())
    mcore_cpu.apply()
    assert torch.cuda.current_device is before


def test_tracker_gives_tensor_parallel_regions_their_own_stream():
    mcore_cpu.apply()
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    torch.manual_seed(1)
    outside = torch.rand(2)
    torch.manual_seed(1)
    tracker.add("region", 7)
    with tracker.fork("region"):
        first = torch.rand(2)
    assert torch.equal(torch.rand(2), outside)
    with tracker.fork("region"):
        second = torch.rand(2)
    expected = torch.rand(4, generator=torch.Generator().manual_seed(7))
    assert torch.equal(torch.cat((first, second)), expected)


def test_only_one_file_patches_megatron_core():
    pattern = re.compile(
        r"^\s*torch\.cuda\.\w+\s*=[^=]|setattr\(torch|torch\.Tensor\.\w+\s*=[^=]", re.M
    )
    offenders = [p.name for p in PACKAGE.rglob("*.py") if pattern.search(p.read_text())]
    assert offenders in ([], ["mcore_cpu.py"])
