"""The kernels' formulas in torch's ordinary operations, differentiated by autograd.

The kernels' tests compare with these, and the kernel benchmark times them. A 16-bit norm or row
statistic is computed in fp32 and rounded once, as stock layers do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """In fp32, or in fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def interleave(tokens: Tensor, thoughts: Tensor) -> Tensor:
    """Each token's slots side by side: [s, b, h] and [s*(n-1), b, h] -> [s*n, b, h]."""
    s, b, h = tokens.shape
    return torch.cat((tokens[:, None], thoughts.view(s, -1, b, h)), dim=1).flatten(0, 1)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """LayerNorm, or RMSNorm where there is no bias, over the last dim."""
    if bias is not None:
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def add(residual: Tensor, *branches: Tensor | None) -> Tensor:
    """Residual stream plus branches, given as x, bias, x, bias, ...; a bias may be None."""
    for x, bias in zip(branches[::2], branches[1::2], strict=True):
        assert x is not None
        residual = residual + (x if bias is None else x + bias)
    return residual


def split_and_rotate(
    mixed: Tensor, table: tuple[Tensor, Tensor], head_dim: int
) -> tuple[Tensor, ...]:
    """Rotated queries and keys, and values, laid out for attention.

    Args:
        mixed: joint projection, [slots, b, groups, (heads per group + 2) * d].
        table: cosines and sines of half of the rotated channels, [slots, 1, 1, r / 2].
        head_dim: d.

    Returns:
        [slots, b, heads, d], heads before slots in memory.
    """
    cos, sin = (torch.cat((part, part), dim=-1) for part in table)
    r = cos.size(-1)

    def rotate(x: Tensor) -> Tensor:
        first, second = x[..., :r].chunk(2, dim=-1)
        turned = x[..., :r] * cos + torch.cat((-second, first), dim=-1) * sin
        return torch.cat((turned, x[..., r:]), dim=-1)

    query, key, value = mixed.split((mixed.size(-1) - 2 * head_dim, head_dim, head_dim), dim=-1)
    query = query.reshape(*query.shape[:2], -1, head_dim)
    return tuple(
        part.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
        for part in (rotate(query), rotate(key), value)
    )


def swiglu(x: Tensor) -> Tensor:
    """silu(a) * b for x = (a, b): [..., 2f] -> [..., f]."""
    a, b = x.chunk(2, dim=-1)
    return F.silu(a) * b


def gelu(x: Tensor, bias: Tensor, is_tanh: bool) -> Tensor:
    """GELU of x + bias, exact or by tanh."""
    return F.gelu(x + bias, approximate="tanh" if is_tanh else "none")


def row_statistics(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each row: largest logit, sum of exp(logit - largest), logit of the label; [3, rows]."""
    wide = _wide(logits)
    largest = wide.amax(dim=1)
    total = (wide - largest[:, None]).exp().sum(dim=1)
    return torch.stack((largest, total, wide.gather(1, labels[:, None])[:, 0]))


def logits_gradient(logits: Tensor, labels: Tensor, log_sum: Tensor, gradient: Tensor) -> Tensor:
    """Gradient of the cross entropy by the logits: (softmax - one-hot) times each row's."""
    probabilities = (_wide(logits) - log_sum[:, None]).exp()
    one_hot = F.one_hot(labels, logits.size(1))
    return ((probabilities - one_hot) * gradient[:, None]).to(logits.dtype)


def weight_gradient(buffer: Tensor, dy: Tensor, x: Tensor) -> Tensor:
    """Add dy^T x to a buffer in fp32."""
    return buffer.add_((dy.t() @ x).to(buffer.dtype))
