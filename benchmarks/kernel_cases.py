"""Each kernel at one shape: the call, its eager form, inputs, and the bytes that it must move.

A new kernel is one more case in `build_cases`. Whether a kernel has a Triton form is read from its
module.
"""

import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.kernels.cross_entropy import logits_gradient_, row_statistics_
from megatron_ponder.kernels.gelu import gelu
from megatron_ponder.kernels.interleave import embed_and_interleave, interleave, select_slots
from megatron_ponder.kernels.residual import add_and_norm, add_branches, norm_beside_residual
from megatron_ponder.kernels.rms_norm import rms_norm
from megatron_ponder.kernels.rotary import rotary_table, split_and_rotate
from megatron_ponder.kernels.slot_norm import norm_slots
from megatron_ponder.kernels.swiglu import swiglu
from megatron_ponder.kernels.weight_gradient import add_weight_gradient
from tests.reference import kernels as eager

Function = Callable[..., Any]
EPS = 1e-5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a model's longest pass over one micro-batch."""

    tokens: int
    batch: int
    slots_per_token: int
    hidden: int
    ffn: int
    groups: int
    heads: int
    head_dim: int
    rotated: int
    vocabulary: int


def sizes_of(config: ResolvedConfig) -> Sizes:
    """The sizes of a resolved run; at least two slots per token, so that there are thoughts."""
    model = config.model
    return Sizes(
        tokens=config.data.seq_length,
        batch=config.training.micro_batch_size,
        slots_per_token=max(2, config.method.num_latent_thoughts + 1),
        hidden=model.hidden_size,
        ffn=model.ffn_hidden_size,
        groups=model.num_query_groups,
        heads=model.num_attention_heads,
        head_dim=model.kv_channels,
        rotated=int(model.rotary_percent * model.kv_channels),
        vocabulary=model.vocab_size,
    )


@dataclasses.dataclass(frozen=True)
class KernelCase:
    """One kernel at one shape."""

    name: str
    defined_in: Function
    """A function of its module."""
    kernel: Function
    """A call of it; of the inputs only."""
    eager: Function
    """The same in ordinary operations."""
    inputs: dict[str, Tensor]
    """Arguments of both, in order."""
    leaves: tuple[str, ...]
    """Inputs with a gradient; none: the kernel is not differentiated."""
    forward_values: int
    """Elements of the run's dtype that the forward must move."""
    backward_values: int = 0
    """The same of the backward."""

    @property
    def has_triton(self) -> bool:
        """Whether its module dispatches to a Triton form."""
        return hasattr(sys.modules[self.defined_in.__module__], "uses_triton")


class _Random:
    """Random tensors, the same every time."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._generator = torch.Generator(device).manual_seed(1)

    def floats(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normally distributed, in the run's dtype unless another is given."""
        x = torch.randn(shape, generator=self._generator, device=self._device)
        return x.to(dtype or self._dtype)

    def ids(self, below: int, *shape: int) -> Tensor:
        """int64, each below `below`."""
        return torch.randint(below, shape, generator=self._generator, device=self._device)


def build_cases(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[KernelCase]:
    """All cases, with random inputs."""
    make = _Random(dtype, device)
    builders = (_slots, _norms, _residual, _rotary, _activation, _loss, _weight_gradient)
    return [case for build in builders for case in build(sizes, make)]


def _slots(sizes: Sizes, make: _Random) -> Iterator[KernelCase]:
    """Token embeddings and thoughts interleaved, and some slots selected."""
    s, b, h, n = sizes.tokens, sizes.batch, sizes.hidden, sizes.slots_per_token
    values, scale = s * b * h, math.sqrt(2.5 * h)
    thoughts = make.floats(s * (n - 1), b, h)
    yield KernelCase(
        "embed, scale, interleave",
        embed_and_interleave,
        lambda ids, weight, thoughts: embed_and_interleave(
            ids, weight, thoughts, scale=scale, first_row=0
        ),
        lambda ids, weight, thoughts: eager.interleave(
            F.embedding(ids.t(), weight) * scale, thoughts
        ),
        {
            "ids": make.ids(sizes.vocabulary, b, s),
            "weight": make.floats(sizes.vocabulary, h),
            "thoughts": thoughts,
        },
        ("weight", "thoughts"),
        2 * n * values,
        (2 * n - 1) * values + sizes.vocabulary * h,
    )
    yield KernelCase(
        "interleave",
        interleave,
        interleave,
        eager.interleave,
        {"tokens": make.floats(s, b, h), "thoughts": thoughts},
        ("tokens", "thoughts"),
        2 * n * values,
        2 * n * values,
    )
    yield KernelCase(
        "select slots",
        select_slots,
        lambda hidden: select_slots(hidden, n, range(n - 1, n)),
        lambda hidden: hidden[n - 1 :: n].contiguous(),
        {"hidden": make.floats(s * n, b, h)},
        ("hidden",),
        2 * values,
        (1 + n) * values,
    )


def _stream(sizes: Sizes, make: _Random) -> Tensor:
    """Hidden states of all slots, [s*n, b, h]."""
    return make.floats(sizes.tokens * sizes.slots_per_token, sizes.batch, sizes.hidden)


def _norms(sizes: Sizes, make: _Random) -> Iterator[KernelCase]:
    """RMSNorm of all slots, and of the output slots."""
    n, values = sizes.slots_per_token, sizes.tokens * sizes.batch * sizes.hidden
    inputs = {"x": _stream(sizes, make), "weight": make.floats(sizes.hidden)}
    yield KernelCase(
        "RMSNorm",
        rms_norm,
        lambda x, w: rms_norm(x, w, EPS),
        lambda x, w: eager.norm(x, w, None, EPS),
        inputs,
        ("x", "weight"),
        2 * n * values,
        3 * n * values,
    )
    yield KernelCase(
        "RMSNorm of one slot per token",
        norm_slots,
        lambda x, w: norm_slots(x, n, range(n - 1, n), w, None, EPS, is_layer_norm=False),
        lambda x, w: eager.norm(x[n - 1 :: n], w, None, EPS),
        inputs,
        ("x", "weight"),
        2 * values,
        (2 + n) * values,
    )


def _residual(sizes: Sizes, make: _Random) -> Iterator[KernelCase]:
    """Adds to the residual stream and its norms, of Llama's layer and of GPT-NeoX's."""
    x, branch, branch_2 = (_stream(sizes, make) for _ in range(3))
    values = x.numel()
    names = ("weight", "bias", "weight_2", "bias_2")
    vectors = {name: make.floats(sizes.hidden) for name in names}
    yield KernelCase(
        "add and RMSNorm",
        add_and_norm,
        lambda x, y, w: add_and_norm(x, (y, None), (w, None), eps=EPS),
        lambda x, y, w: (x + y, eager.norm(x + y, w, None, EPS)),
        {"x": x, "branch": branch, "weight": vectors["weight"]},
        ("x", "branch", "weight"),
        4 * values,
        4 * values,
    )
    yield KernelCase(
        "RMSNorm beside the residual",
        norm_beside_residual,
        lambda x, w: norm_beside_residual(x, (w, None), eps=EPS),
        lambda x, w: (x * 1, eager.norm(x, w, None, EPS)),
        {"x": x, "weight": vectors["weight"]},
        ("x", "weight"),
        2 * values,
        4 * values,
    )
    yield KernelCase(
        "two LayerNorms beside the residual",
        norm_beside_residual,
        lambda x, w, c, w2, c2: norm_beside_residual(x, (w, c), (w2, c2), eps=EPS),
        lambda x, w, c, w2, c2: (x * 1, eager.norm(x, w, c, EPS), eager.norm(x, w2, c2, EPS)),
        {"x": x} | vectors,
        ("x", *names),
        3 * values,
        5 * values,
    )
    biases = {"bias": vectors["bias"], "branch_2": branch_2, "bias_2": vectors["bias_2"]}
    yield KernelCase(
        "add two branches with biases",
        add_branches,
        lambda x, y, c, z, d: add_branches(x, (y, c), (z, d)),
        eager.add,
        {"x": x, "branch": branch} | biases,
        ("x", "branch", *biases),
        4 * values,
        values,
    )


def _rotary(sizes: Sizes, make: _Random) -> Iterator[KernelCase]:
    """The joint projection to rotated queries, keys, and values."""
    d, groups = sizes.head_dim, sizes.groups
    width = (sizes.heads // groups + 2) * d
    slots = sizes.tokens * sizes.slots_per_token
    mixed = make.floats(slots, sizes.batch, groups, width)
    half = make.floats(sizes.tokens, 1, 1, sizes.rotated // 2, dtype=torch.float32)
    angles = torch.cat((half, half), dim=-1)
    yield KernelCase(
        "split and rotate",
        split_and_rotate,
        lambda mixed, table: split_and_rotate(mixed, table, d),
        lambda mixed, table: eager.split_and_rotate(mixed, table, d),
        {"mixed": mixed, "table": rotary_table(angles, sizes.slots_per_token, mixed.dtype)},
        ("mixed",),
        2 * mixed.numel(),
        2 * mixed.numel(),
    )


def _activation(sizes: Sizes, make: _Random) -> Iterator[KernelCase]:
    """The gate of a gated MLP, and the activation of one without."""
    slots = sizes.tokens * sizes.slots_per_token
    gated = make.floats(slots, sizes.batch, 2 * sizes.ffn)
    values = gated.numel() // 2
    yield KernelCase(
        "SwiGLU", swiglu, swiglu, eager.swiglu, {"x": gated}, ("x",), 3 * values, 5 * values
    )
    inputs = {"x": make.floats(slots, sizes.batch, sizes.ffn), "bias": make.floats(sizes.ffn)}
    for form in ("exact", "tanh"):
        yield KernelCase(
            f"bias and GELU, {form}",
            gelu,
            functools.partial(gelu, is_tanh=form == "tanh"),
            functools.partial(eager.gelu, is_tanh=form == "tanh"),
            inputs,
            ("x", "bias"),
            2 * values,
            3 * values,
        )


def _loss(sizes: Sizes, make: _Random) -> Iterator[KernelCase]:
    """Statistics of logits, and their gradient, of a chunk of the tokens."""
    columns = sizes.vocabulary
    rows = min(sizes.tokens * sizes.batch, max(1, (1 << 27) // columns))
    inputs = {"logits": make.floats(rows, columns), "labels": make.ids(columns, rows)}
    log_sum = torch.logsumexp(inputs["logits"].float(), dim=1)
    values = rows * columns
    yield KernelCase(
        "cross entropy: statistics",
        row_statistics_,
        lambda logits, labels: row_statistics_(logits, labels, columns),
        eager.row_statistics,
        inputs,
        (),
        values,
    )
    yield KernelCase(
        "cross entropy: gradient",
        logits_gradient_,
        lambda x, y, log_sum, g: logits_gradient_(x, y, log_sum, g, columns),
        eager.logits_gradient,
        inputs | {"log_sum": log_sum, "gradient": torch.ones_like(log_sum)},
        (),
        2 * values,
    )


def _weight_gradient(sizes: Sizes, make: _Random) -> Iterator[KernelCase]:
    """A matmul that is added to an fp32 buffer; its floor is arithmetic, not traffic."""
    rows = sizes.tokens * sizes.slots_per_token * sizes.batch
    dy, x = make.floats(rows, sizes.ffn), make.floats(rows, sizes.hidden)
    buffer = torch.zeros(sizes.ffn, sizes.hidden, device=x.device)

    def kernel(buffer: Tensor, dy: Tensor, x: Tensor) -> Tensor:
        add_weight_gradient(buffer, dy, x)
        return buffer

    yield KernelCase(
        "weight gradient",
        add_weight_gradient,
        kernel,
        eager.weight_gradient,
        {"buffer": buffer, "dy": dy, "x": x},
        (),
        dy.numel() + x.numel() + 2 * buffer.numel() * 4 // x.element_size(),
    )
