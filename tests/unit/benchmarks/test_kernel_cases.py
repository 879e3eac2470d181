"""The list of kernels is complete, and each case compares the kernel with the same computation."""

import dataclasses
from pathlib import Path

import pytest
import torch

import megatron_ponder.kernels
from benchmarks.kernel_cases import Sizes, build_cases
from benchmarks.kernels import largest_error, measure_case, results
from megatron_ponder.kernels.dispatch import kernels_chosen

SIZES = Sizes(
    tokens=5,
    batch=2,
    slots_per_token=3,
    hidden=12,
    ffn=7,
    groups=2,
    heads=4,
    head_dim=6,
    rotated=4,
    vocabulary=23,
)
CASES = {case.name: case for case in build_cases(SIZES, torch.float32, torch.device("cpu"))}
NO_KERNELS = {"__init__", "dispatch", "operands"}


def error(case):
    return largest_error(results(case, case.kernel), results(case, case.eager, torch.float64))


def test_every_file_of_kernels_has_a_case():
    folder = Path(megatron_ponder.kernels.__file__).parent
    files = {path.stem for path in folder.glob("*.py")} - NO_KERNELS
    assert files == {case.defined_in.__module__.rsplit(".", 1)[1] for case in CASES.values()}


@pytest.mark.parametrize("name", CASES)
def test_kernel_is_its_eager_form_and_a_wrong_one_is_caught(name):
    case = CASES[name]

    def wrong(*inputs):
        outputs = case.kernel(*inputs)
        first, *others = outputs if isinstance(outputs, tuple) else (outputs,)
        return (1.001 * first, *others)

    assert error(case) < 1e-5
    assert error(dataclasses.replace(case, kernel=wrong)) > 1e-4


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name].has_triton])
def test_triton_form_is_the_eager_form(name):
    """In Triton's interpreter where there is no GPU."""
    with kernels_chosen("triton"):
        assert error(CASES[name]) < 1e-5


def test_a_case_is_timed_in_all_its_forms():
    """Triton's as on a GPU, in its interpreter."""
    forms = measure_case(CASES["interleave"], times_triton=True)["forms"]
    assert set(forms) == {"eager", "torch", "triton"}
    for form in forms.values():
        assert form["error"] < 1e-5 and form["forward_ms"] > 0 and form["backward_ms"] > 0
    assert forms["eager"]["eager_over_this"] == 1


def test_those_with_a_triton_form_are_known():
    assert CASES["interleave"].has_triton and not CASES["RMSNorm"].has_triton
