"""RMSNorm and LayerNorm for megatron-core layers.

megatron-core's torch norm refuses sequence parallelism. Under it each rank norms its own slots, so
a norm's gradient is a partial sum, and its parameters must say so: megatron-core adds up the
gradients of parameters that carry `sequence_parallel = True` over the tensor-parallel ranks.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ponder.kernels.rms_norm import rms_norm
from megatron_ponder.kernels.stage_norm import norm_stages
from megatron_ponder.model.stages import keep_stages, stages_of


class RMSNorm(torch.nn.RMSNorm):
    """torch's module on this package's kernels."""

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """[..., h] -> [..., h], or of [s * stages, b, h] the stages that are kept."""
        assert self.eps is not None
        if kept is None:
            return rms_norm(x, self.weight, self.eps)
        num_stages, stages = stages_of(kept)
        return norm_stages(x, num_stages, stages, self.weight, None, self.eps, is_layer_norm=False)


class LayerNorm(torch.nn.LayerNorm):
    """The same for torch's LayerNorm."""

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """As RMSNorm's."""
        if kept is None:
            return super().forward(x)
        num_stages, stages = stages_of(kept)
        return norm_stages(
            x, num_stages, stages, self.weight, self.bias, self.eps, is_layer_norm=True
        )


def norm_kept(norm: torch.nn.Module, hidden: Tensor, kept: Tensor | None) -> Tensor:
    """The norm of the stages that are kept, all where `kept` is None.

    Fused for our norms. TransformerEngine's layers have theirs inside and the identity here.
    """
    if isinstance(norm, RMSNorm | LayerNorm):
        return norm(hidden, kept)
    return norm(keep_stages(hidden, kept))


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
