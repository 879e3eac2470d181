"""RMSNorm and LayerNorm for megatron-core layers.

megatron-core's torch norm refuses sequence parallelism. Under it each rank norms its own slots, so
a norm's gradient is a partial sum, and its parameters must say so: megatron-core adds up the
gradients of parameters that carry `sequence_parallel = True` over the tensor-parallel ranks.
"""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ponder.kernels.rms_norm import rms_norm


class RMSNorm(torch.nn.RMSNorm):
    """torch's module on this package's kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h]."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class Norm:
    """Builds the norm that the config names; what megatron-core calls with its norm arguments."""

    def __new__(  # type: ignore[misc]
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: object
    ) -> torch.nn.Module:
        """A norm over the last dim; parameters of shape [hidden_size] in config.params_dtype."""
        kinds: dict[str, type[torch.nn.Module]] = {
            "RMSNorm": RMSNorm,
            "LayerNorm": torch.nn.LayerNorm,
        }
        norm = kinds[config.normalization](
            hidden_size, eps=eps, dtype=config.params_dtype, device=torch.cuda.current_device()
        )
        for parameter in norm.parameters():
            setattr(parameter, "sequence_parallel", config.sequence_parallel)
        return norm
