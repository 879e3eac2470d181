"""Core attention on the flash-attn library, where it is asked for (--attention-backend flash).

Needs CUDA and 16 bits. torch has FlashAttention-2 too, and on Hopper cuDNN's faster kernel; this is
for builds of flash-attn that are newer than torch's copy. Has not run yet: no GPU was available.
"""

from megatron.core import tensor_parallel
from torch import Tensor
from torch.nn.attention.bias import CausalBias

from megatron_ponder.model.attention import SdpaCoreAttention


class FlashCoreAttention(SdpaCoreAttention):
    """As the base class, by flash_attn_func."""

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | CausalBias | None = None
    ) -> Tensor:
        """As the base class, without masks: inference runs on torch's attention."""
        from flash_attn import flash_attn_func

        assert mask is None
        s, b, heads, d = query.shape
        # [s, b, heads, d] -> [b, s, heads, d], views
        batch_first = [t.transpose(0, 1) for t in (query, key, value)]
        dropout = self.dropout if self.training else 0.0
        if dropout:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                context = flash_attn_func(*batch_first, dropout, self.softmax_scale, causal=True)
        else:
            context = flash_attn_func(*batch_first, 0.0, self.softmax_scale, causal=True)
        # [b, s, heads, d] -> [s, b, heads * d]
        slots_first: Tensor = context.transpose(0, 1).reshape(s, b, heads * d)
        return slots_first
