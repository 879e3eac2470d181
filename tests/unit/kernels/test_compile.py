"""Every Triton kernel compiles for Hopper, on any machine."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.thorough


def test_kernels_compile_for_hopper(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-m", "tests.unit.kernels.compile_for_hopper"],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("bytes") >= 20
