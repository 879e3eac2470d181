"""RMSNorm and LayerNorm for megatron-core layers, alone or fused with their neighbours.

megatron-core's torch norm refuses sequence parallelism. Under it each rank norms its own slots, so
the gradient of a norm's parameters is a partial sum. megatron-core reduces the gradients of
parameters with `sequence_parallel = True` over the tensor-parallel ranks, so ours carry that mark.

The functions below fuse a norm where it is one of ours. TransformerEngine's layers norm inside
their linear modules and have the identity in its place, which the functions call as it is.
"""

import functools

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ponder.kernels import residual as kernels
from megatron_ponder.kernels.operands import Branch, NormParameters
from megatron_ponder.kernels.rms_norm import rms_norm
from megatron_ponder.kernels.slot_norm import norm_slots
from megatron_ponder.model.output_slots import select_outputs
from megatron_ponder.model.selective_recompute import mark_recomputable
from megatron_ponder.ponder.plan import Pass


class RMSNorm(torch.nn.RMSNorm):
    """torch's module on this package's kernels."""

    eps: float

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(torch.nn.LayerNorm):
    """torch's module, under a name that tells it from others."""


OurNorm = RMSNorm | LayerNorm


def parameters_of(norm: OurNorm) -> NormParameters:
    """The weight and bias of a norm, for a kernel that does more than the norm.

    Runs the hooks that run before a call of the module: with `--overlap-param-gather` that is where
    megatron-core waits for the module's parameters. Reading the attributes alone would use them
    before they are gathered.
    """
    for hook in norm._forward_pre_hooks.values():
        hook(norm, ())
    return norm.weight, norm.bias if isinstance(norm, LayerNorm) else None


def norm_output_slots(norm: torch.nn.Module, pass_: Pass, hidden: Tensor) -> Tensor:
    """Norm the output slots of a pass: [s * slots_per_token, b, h] -> [s * outputs, b, h]."""
    if not isinstance(norm, OurNorm):
        normed: Tensor = norm(select_outputs(hidden, pass_))
        return normed
    weight, bias = parameters_of(norm)
    return norm_slots(
        hidden,
        pass_.slots_per_token,
        pass_.output_slots,
        weight,
        bias,
        norm.eps,
        is_layer_norm=isinstance(norm, LayerNorm),
    )


def norm_beside_residual(hidden: Tensor, *norms: torch.nn.Module) -> tuple[Tensor, ...]:
    """The residual stream and one or two norms of it, all [s, b, h]."""
    ours = [norm for norm in norms if isinstance(norm, OurNorm)]
    if len(ours) < len(norms):
        return hidden, *(norm(hidden) for norm in norms)
    parameters, eps = [parameters_of(norm) for norm in ours], ours[0].eps
    residual, *normed = kernels.norm_beside_residual(hidden, *parameters, eps=eps)
    for output, of_norm in zip(normed, parameters, strict=True):
        mark_recomputable(output, functools.partial(_norm, of_norm, eps), residual)
    return residual, *normed


def add_and_norm(residual: Tensor, branch: Branch, norm: torch.nn.Module) -> tuple[Tensor, Tensor]:
    """The residual stream plus a branch, and the norm of the sum, both [s, b, h]."""
    if not isinstance(norm, OurNorm):
        total = kernels.add_branches(residual, branch)
        return total, norm(total)
    parameters = parameters_of(norm)
    total, normed = kernels.add_and_norm(residual, branch, parameters, eps=norm.eps)
    mark_recomputable(normed, functools.partial(_norm, parameters, norm.eps), total)
    return total, normed


def _norm(parameters: NormParameters, eps: float, x: Tensor) -> Tensor:
    """The norm alone, in the bits of both fused kernels."""
    return kernels.norm_beside_residual(x, parameters, eps=eps)[1]


class Norm:
    """Builds the norm that the config names; megatron-core calls it with its norm arguments."""

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object
    ) -> OurNorm:
        """A norm over the last dim; parameters of shape [hidden_size] in config.params_dtype."""
        kinds: dict[str, type[OurNorm]] = {"RMSNorm": RMSNorm, "LayerNorm": LayerNorm}
        norm = kinds[config.normalization](
            hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        for parameter in norm.parameters():
            setattr(parameter, "sequence_parallel", config.sequence_parallel)
        return norm
