"""The kernels as a list of cases (`kernel_case`); a new kernel is one more here."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernel_case import Inputs, KernelCase, Sizes
from megatron_ponder.kernels.cross_entropy import logits_gradient_, row_statistics_
from megatron_ponder.kernels.gelu import gelu
from megatron_ponder.kernels.interleave import embed_and_interleave, interleave, select_slots
from megatron_ponder.kernels.residual import add_and_norm, add_branches, norm_beside_residual
from megatron_ponder.kernels.rms_norm import rms_norm
from megatron_ponder.kernels.rotary import rotary_table, split_and_rotate
from megatron_ponder.kernels.slot_norm import norm_slots
from megatron_ponder.kernels.swiglu import swiglu
from megatron_ponder.kernels.weight_gradient import add_weight_gradient

EPSILON = 1e-5


def build_cases(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> list[KernelCase]:
    """All cases, with random inputs."""
    make = Inputs(dtype, device)
    builders = (_slots, _norms, _residual, _rotary, _activation, _loss, _weight_gradient)
    return [case for build in builders for case in build(sizes, make)]


def _slots(sizes: Sizes, make: Inputs) -> list[KernelCase]:
    """Token embeddings and thoughts in one buffer, and back."""
    s, b, h, n = sizes.tokens, sizes.batch, sizes.hidden, sizes.stages
    values, table = sizes.token_values, sizes.vocabulary * h
    scale = float(math.sqrt(2.5 * h))
    thoughts = make.floats(s * (n - 1), b, h)

    def lay_out(tokens: Tensor, thoughts: Tensor) -> Tensor:
        return torch.cat((tokens[:, None], thoughts.view(s, n - 1, b, h)), dim=1).flatten(0, 1)

    return [
        KernelCase(
            name="embed, scale, interleave",
            kernel=lambda ids, weight, thoughts: embed_and_interleave(
                ids, weight, thoughts, scale=scale, first_row=0
            ),
            eager=lambda ids, weight, thoughts: lay_out(
                F.embedding(ids.t(), weight) * scale, thoughts
            ),
            inputs={
                "ids": make.ids(sizes.vocabulary, b, s),
                "weight": make.floats(sizes.vocabulary, h),
                "thoughts": thoughts,
            },
            leaves=("weight", "thoughts"),
            forward_values=2 * n * values,
            backward_values=(2 * n - 1) * values + table,
            defined_in=embed_and_interleave,
        ),
        KernelCase(
            name="interleave",
            kernel=interleave,
            eager=lay_out,
            inputs={"tokens": make.floats(s, b, h), "thoughts": thoughts},
            leaves=("tokens", "thoughts"),
            forward_values=2 * n * values,
            backward_values=2 * n * values,
            defined_in=interleave,
        ),
        KernelCase(
            name="select stages",
            kernel=lambda hidden: select_slots(hidden, n, range(n - 1, n)),
            eager=lambda hidden: hidden[n - 1 :: n].contiguous(),
            inputs={"hidden": make.floats(s * n, b, h)},
            leaves=("hidden",),
            forward_values=2 * values,
            backward_values=(1 + n) * values,
            defined_in=select_slots,
        ),
    ]


def _norms(sizes: Sizes, make: Inputs) -> list[KernelCase]:
    """RMSNorm of all slots, and of the stages that are read."""
    n, values = sizes.stages, sizes.token_values
    hidden = make.floats(sizes.slots, sizes.batch, sizes.hidden)
    weight = make.floats(sizes.hidden)

    return [
        KernelCase(
            name="RMSNorm",
            kernel=lambda x, weight: rms_norm(x, weight, EPSILON),
            eager=_eager_rms_norm,
            inputs={"x": hidden, "weight": weight},
            leaves=("x", "weight"),
            forward_values=2 * n * values,
            backward_values=3 * n * values,
            defined_in=rms_norm,
        ),
        KernelCase(
            name="RMSNorm of one stage",
            kernel=lambda x, weight: norm_slots(
                x, n, range(n - 1, n), weight, None, EPSILON, is_layer_norm=False
            ),
            eager=lambda x, weight: _eager_rms_norm(x[n - 1 :: n], weight),
            inputs={"x": hidden, "weight": weight},
            leaves=("x", "weight"),
            forward_values=2 * values,
            backward_values=(2 + n) * values,
            defined_in=norm_slots,
        ),
    ]


def _eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPSILON)).to(x.dtype) * weight


def _residual(sizes: Sizes, make: Inputs) -> list[KernelCase]:
    """Adds to the residual stream and norms of it: of Llama's layer, and of GPT-NeoX's."""
    shape, h = (sizes.slots, sizes.batch, sizes.hidden), sizes.hidden
    values = math.prod(shape)
    stream, branch = make.floats(*shape), make.floats(*shape)
    weights = {"weight": make.floats(h), "bias": make.floats(h)}
    second = {"weight_2": make.floats(h), "bias_2": make.floats(h)}

    def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.layer_norm(x, weight.shape, weight, bias, EPSILON)

    return [
        KernelCase(
            name="add and RMSNorm",
            kernel=lambda x, y, w: add_and_norm(x, (y, None), (w, None), eps=EPSILON),
            eager=lambda x, y, w: (x + y, _eager_rms_norm(x + y, w)),
            inputs={"x": stream, "branch": branch, "weight": weights["weight"]},
            leaves=("x", "branch", "weight"),
            forward_values=4 * values,
            backward_values=4 * values,
            defined_in=add_and_norm,
        ),
        KernelCase(
            name="RMSNorm beside the residual",
            kernel=lambda x, w: norm_beside_residual(x, (w, None), eps=EPSILON),
            eager=lambda x, w: (x * 1, _eager_rms_norm(x, w)),
            inputs={"x": stream, "weight": weights["weight"]},
            leaves=("x", "weight"),
            forward_values=2 * values,
            backward_values=4 * values,
            defined_in=norm_beside_residual,
        ),
        KernelCase(
            name="two LayerNorms beside the residual",
            kernel=lambda x, w, c, w2, c2: norm_beside_residual(x, (w, c), (w2, c2), eps=EPSILON),
            eager=lambda x, w, c, w2, c2: (x * 1, layer_norm(x, w, c), layer_norm(x, w2, c2)),
            inputs={"x": stream} | weights | second,
            leaves=("x", *weights, *second),
            forward_values=3 * values,
            backward_values=5 * values,
            defined_in=norm_beside_residual,
        ),
        KernelCase(
            name="add two branches with biases",
            kernel=lambda x, y, c, z, d: add_branches(x, (y, c), (z, d)),
            eager=lambda x, y, c, z, d: x + (y + c) + (z + d),
            inputs={
                "x": stream,
                "branch": branch,
                "bias": weights["bias"],
                "branch_2": make.floats(*shape),
                "bias_2": second["bias_2"],
            },
            leaves=("x", "branch", "bias", "branch_2", "bias_2"),
            forward_values=4 * values,
            backward_values=values,
            defined_in=add_branches,
        ),
    ]


def _rotary(sizes: Sizes, make: Inputs) -> list[KernelCase]:
    """The joint projection to rotated queries, keys, and values."""
    d, rotated = sizes.head_dim, sizes.rotated
    width = sizes.qkv_width // sizes.groups
    mixed = make.floats(sizes.slots, sizes.batch, sizes.groups, width)
    half = make.floats(sizes.tokens, 1, 1, rotated // 2, dtype=torch.float32)
    table = rotary_table(torch.cat((half, half), dim=-1), sizes.stages, mixed.dtype)

    def rotate(x: Tensor, table: Tensor) -> Tensor:
        cos, sin = (torch.cat((part, part), dim=-1) for part in table)
        turned, rest = x[..., :rotated], x[..., rotated:]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
        return torch.cat((turned, rest), dim=-1)

    def eager(mixed: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = mixed.split((width - 2 * d, d, d), dim=-1)
        query = query.reshape(*query.shape[:2], -1, d)
        return tuple(
            part.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
            for part in (rotate(query, table), rotate(key, table), value)
        )  # type: ignore[return-value]

    return [
        KernelCase(
            name="split and rotate",
            kernel=lambda mixed, table: split_and_rotate(mixed, table, d),
            eager=eager,
            inputs={"mixed": mixed, "table": table},
            leaves=("mixed",),
            forward_values=2 * mixed.numel(),
            backward_values=2 * mixed.numel(),
            defined_in=split_and_rotate,
        )
    ]


def _activation(sizes: Sizes, make: Inputs) -> list[KernelCase]:
    """The gate of a gated MLP, and the activation of one without."""
    x = make.floats(sizes.slots, sizes.batch, 2 * sizes.ffn)
    ungated, bias = make.floats(sizes.slots, sizes.batch, sizes.ffn), make.floats(sizes.ffn)

    def eager(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return F.silu(a) * b

    return [
        KernelCase(
            name="SwiGLU",
            kernel=swiglu,
            eager=eager,
            inputs={"x": x},
            leaves=("x",),
            forward_values=3 * x.numel() // 2,
            backward_values=5 * x.numel() // 2,
            defined_in=swiglu,
        ),
        *(
            KernelCase(
                name=f"bias and GELU, {form}",
                kernel=functools.partial(gelu, is_tanh=form == "tanh"),
                eager=lambda x, bias, form=form: F.gelu(
                    x + bias, approximate="tanh" if form == "tanh" else "none"
                ),
                inputs={"x": ungated, "bias": bias},
                leaves=("x", "bias"),
                forward_values=2 * ungated.numel(),
                backward_values=3 * ungated.numel(),
                defined_in=gelu,
            )
            for form in ("exact", "tanh")
        ),
    ]


def _loss(sizes: Sizes, make: Inputs) -> list[KernelCase]:
    """Statistics of logits, and their gradient, of a chunk of the tokens."""
    columns = sizes.vocabulary
    rows = min(sizes.tokens * sizes.batch, max(1, (1 << 27) // columns))
    logits, labels = make.floats(rows, columns), make.ids(columns, rows)
    log_sum = torch.logsumexp(logits.float(), dim=1)
    gradient = torch.ones_like(log_sum)

    def statistics(logits: Tensor, labels: Tensor) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        largest = wide.amax(dim=1)
        total = (wide - largest[:, None]).exp().sum(dim=1)
        return torch.stack((largest, total, wide.gather(1, labels[:, None])[:, 0]))

    def derivative(logits: Tensor, labels: Tensor, log_sum: Tensor, gradient: Tensor) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        probabilities = (wide - log_sum[:, None]).exp()
        one_hot = F.one_hot(labels, columns)
        return ((probabilities - one_hot) * gradient[:, None]).to(logits.dtype)

    return [
        KernelCase(
            name="cross entropy: statistics",
            kernel=lambda logits, labels: row_statistics_(logits, labels, columns),
            eager=statistics,
            inputs={"logits": logits, "labels": labels},
            forward_values=logits.numel(),
            defined_in=row_statistics_,
        ),
        KernelCase(
            name="cross entropy: gradient",
            kernel=lambda x, y, log_sum, g: logits_gradient_(x, y, log_sum, g, columns),
            eager=derivative,
            inputs={"logits": logits, "labels": labels, "log_sum": log_sum, "gradient": gradient},
            forward_values=2 * logits.numel(),
            defined_in=logits_gradient_,
        ),
    ]


def _weight_gradient(sizes: Sizes, make: Inputs) -> list[KernelCase]:
    """A product that is added to an fp32 buffer; its floor is arithmetic, not traffic."""
    rows, h, f = sizes.slots * sizes.batch, sizes.hidden, sizes.ffn
    dy, x = make.floats(rows, f), make.floats(rows, h)
    buffer = torch.zeros(f, h, device=x.device)

    def kernel(buffer: Tensor, dy: Tensor, x: Tensor) -> Tensor:
        add_weight_gradient(buffer, dy, x)
        return buffer

    def eager(buffer: Tensor, dy: Tensor, x: Tensor) -> Tensor:
        return buffer.add_((dy.t() @ x).to(buffer.dtype))

    return [
        KernelCase(
            name="weight gradient",
            kernel=kernel,
            eager=eager,
            inputs={"buffer": buffer, "dy": dy, "x": x},
            forward_values=dy.numel() + x.numel() + 2 * buffer.numel() * 4 // x.element_size(),
            defined_in=add_weight_gradient,
        )
    ]
