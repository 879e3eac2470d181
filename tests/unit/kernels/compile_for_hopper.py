"""Compiles every Triton kernel to machine code for Hopper; needs no GPU. Run as a program.

    python -m tests.unit.kernels.compile_for_hopper

The interpreter takes much that the compiler refuses. Triton compiles an argument of 1 in as a
constant, which is another program with types of its own: each kernel is compiled with and without.
Must not run under TRITON_INTERPRET. Prints a line per kernel.
"""

import itertools
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_ponder.kernels.triton import (
    cross_entropy,
    gelu,
    interleave,
    norm,
    residual,
    rotary,
    swiglu,
)

HOPPER = GPUTarget("cuda", 90, 32)
INT64 = {"labels", "ids", "order"}
FP32 = {
    *("log_sums", "gradients", "table", "means", "inverses", "pieces", "d_parameters", "d_biases"),
}
SCALARS = set(
    "num_rows row_stride num_columns num_padded_columns batch slots_per_token first num_kept "
    "hidden width num_positions rows_each num_groups heads_each head_dim half num_table_rows "
    "table_batch query_slot query_batch query_head key_slot key_batch key_head value_slot "
    "value_batch value_head".split()
)
FLOATS = {"scale", "eps"}
GELU = [
    {"BLOCK": 1024, "HAS_BIAS": has_bias, "IS_TANH": is_tanh}
    for has_bias, is_tanh in itertools.product((True, False), repeat=2)
]
NORM_FORWARD = [
    {"HAS_BRANCH": branch, "HAS_BRANCH_BIAS": bias, "HAS_SECOND": second}
    | {"BLOCK": 512, "ROWS": 2, "IS_LAYER_NORM": is_layer_norm}
    for is_layer_norm in (True, False)
    for branch, bias, second in (
        (False, False, False),
        (False, False, True),
        (True, False, False),
        (True, True, False),
    )
]
NORM_BACKWARD = [
    {"HAS_RESIDUAL": residual, "HAS_BRANCH_BIAS": bias, "HAS_SECOND": second}
    | {"BLOCK": 2048, "ROWS": 1, "IS_LAYER_NORM": is_layer_norm}
    for is_layer_norm in (True, False)
    for residual, bias, second in (
        (False, False, False),
        (True, False, False),
        (True, True, False),
        (True, False, True),
    )
]
KERNELS = {
    cross_entropy._statistics: [{"BLOCK": 4096}],
    cross_entropy._gradient: [{"BLOCK": 4096}],
    interleave._join: [{"BLOCK": 1024, "IS_TABLE": True}, {"BLOCK": 1024, "IS_TABLE": False}],
    interleave._part: [{"BLOCK": 1024, "HAS_TOKENS": True}, {"BLOCK": 64, "HAS_TOKENS": False}],
    interleave._select: [{"BLOCK": 1024}],
    interleave._unselect: [{"BLOCK": 1024}],
    interleave._sum_pieces: [{"BLOCK": 1024}],
    interleave._sum_runs: [{"BLOCK": 1024}],
    norm._forward: NORM_FORWARD,
    norm._backward: NORM_BACKWARD,
    residual._add: [
        {"BLOCK": 1024, "HAS_BIAS": on, "HAS_SECOND": on, "HAS_SECOND_BIAS": on}
        for on in (True, False)
    ],
    swiglu._forward: [{"BLOCK": 1024}],
    swiglu._backward: [{"BLOCK": 1024}],
    gelu._forward: GELU,
    gelu._backward: GELU,
    rotary._rotate: [{"BLOCK": 32}],
    rotary._join_and_rotate_back: [{"BLOCK": 64}],
}
TENSORS_DESPITE_THEIR_NAME = {"norm": {"hidden"}}
FP32_IN = {"cross_entropy": {"out"}}
ONES = ("batch", "slots_per_token", "num_kept", "num_groups", "half", "table_batch")


def signature(kernel, constants: dict, element: str) -> dict[str, str]:
    """Triton's types of a kernel's arguments."""
    module = kernel.fn.__module__.rsplit(".", 1)[1]
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in FLOATS:
            types[name] = "fp32"
        elif name in SCALARS and name not in TENSORS_DESPITE_THEIR_NAME.get(module, ()):
            types[name] = "i32"
        elif name in INT64:
            types[name] = "*i64"
        elif name in FP32 or name in FP32_IN.get(module, ()):
            types[name] = "*fp32"
        else:
            types[name] = f"*{element}"
    return types


def main() -> None:
    """Compile all, or end with the compiler's complaint."""
    for kernel, variants in KERNELS.items():
        for constants, with_ones in itertools.product(variants, (False, True)):
            ones = {name: 1 for name in kernel.arg_names if name in ONES and with_ones}
            if with_ones and not ones:
                continue
            fixed = constants | ones
            source = ASTSource(kernel, signature(kernel, fixed, "bf16"), fixed)
            compiled = triton.compile(source, target=HOPPER)
            size = len(compiled.asm["cubin"])
            print(f"{kernel.fn.__module__}.{kernel.fn.__name__} {fixed}: {size} bytes")


if __name__ == "__main__":
    sys.exit(main())
