"""RMSNorm and LayerNorm for megatron-core layers, alone or joined with what is around them.

megatron-core's torch norm refuses sequence parallelism. Under it each rank norms its own slots, so
a norm's gradient is a partial sum, and its parameters must say so: megatron-core adds up the
gradients of parameters that carry `sequence_parallel = True` over the tensor-parallel ranks.

A kernel that does more than to norm takes parameters, not modules. They are still handed out by a
call of the module: megatron-core waits in a hook of calls for parameters that it gathers.
"""

import functools

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ponder.kernels import residual as kernels
from megatron_ponder.kernels.rms_norm import rms_norm
from megatron_ponder.kernels.slot_norm import norm_slots
from megatron_ponder.model.output_slots import keep_slots, slots_of
from megatron_ponder.model.selective_recompute import note_how


class RMSNorm(torch.nn.RMSNorm):
    """torch's module on this package's kernels."""

    def forward(  # type: ignore[override]
        self, x: Tensor | None = None
    ) -> Tensor | kernels.Parameters:
        """[..., h] -> [..., h]; without a tensor the parameters, weight and no bias."""
        if x is None:
            return self.weight, None
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(torch.nn.LayerNorm):
    """The same for torch's LayerNorm."""

    def forward(  # type: ignore[override]
        self, x: Tensor | None = None
    ) -> Tensor | kernels.Parameters:
        """As RMSNorm's, with a bias."""
        return (self.weight, self.bias) if x is None else super().forward(x)


def norm_kept(norm: torch.nn.Module, hidden: Tensor, kept: Tensor | None) -> Tensor:
    """The norm of the stages that are kept, all where `kept` is None.

    Fused for our norms. TransformerEngine's layers have theirs inside and the identity here.
    """
    if kept is None or not isinstance(norm, RMSNorm | LayerNorm):
        return norm(keep_slots(hidden, kept))
    weight, bias = norm()
    is_layer_norm = isinstance(norm, LayerNorm)
    return norm_slots(
        hidden, *slots_of(kept), weight, bias, _eps(norm), is_layer_norm=is_layer_norm
    )


def norm_beside_residual(hidden: Tensor, *norms: torch.nn.Module) -> tuple[Tensor, ...]:
    """The stream for the residual path, and its norms, fused for ours: all [s, b, h]."""
    if not all(isinstance(norm, RMSNorm | LayerNorm) for norm in norms):
        return hidden, *(norm(hidden) for norm in norms)
    parameters, eps = [norm() for norm in norms], _eps(norms[0])
    residual, *normed = kernels.norm_beside_residual(hidden, *parameters, eps=eps)
    for output, of_norm in zip(normed, parameters, strict=True):
        note_how(output, functools.partial(_normed, of_norm, eps), residual)
    return residual, *normed


def add_and_norm(
    residual: Tensor, branch: kernels.Branch, norm: torch.nn.Module
) -> tuple[Tensor, Tensor]:
    """The stream behind a branch, and its norm, fused for ours: both [s, b, h]."""
    if not isinstance(norm, RMSNorm | LayerNorm):
        total = kernels.add_branches(residual, branch)
        return total, norm(total)
    parameters, eps = norm(), _eps(norm)
    total, normed = kernels.add_and_norm(residual, branch, parameters, eps=eps)
    note_how(normed, functools.partial(_normed, parameters, eps), total)
    return total, normed


def _normed(parameters: kernels.Parameters, eps: float, x: Tensor) -> Tensor:
    """The norm alone, as both kernels compute it."""
    return kernels.norm_beside_residual(x, parameters, eps=eps)[1]


def _eps(norm: torch.nn.Module) -> float:
    eps = norm.eps
    assert isinstance(eps, float)
    return eps


class Norm:
    """Builds the norm that the config names; what megatron-core calls with its norm arguments."""

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object
    ) -> torch.nn.Module:
        """A norm over the last dim; parameters of shape [hidden_size] in config.params_dtype."""
        kinds: dict[str, type[torch.nn.Module]] = {
            "RMSNorm": RMSNorm,
            "LayerNorm": LayerNorm,
        }
        norm = kinds[config.normalization](
            hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        for parameter in norm.parameters():
            setattr(parameter, "sequence_parallel", config.sequence_parallel)
        return norm
