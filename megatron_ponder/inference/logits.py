"""The output layer over the whole vocabulary, whatever part of it each rank has."""

from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_ponder.model.ponder_gpt_model import PonderGPTModel
from megatron_ponder.runtime.distributed import tensor_parallel_group


def whole_logits(model: PonderGPTModel, outputs: Tensor) -> Tensor:
    """Logits over the real vocabulary, the same on all ranks: [s, b, h] -> fp32 [b, s, v]."""
    local = model.compute_output(outputs, None).contiguous()
    whole: Tensor = gather_from_tensor_model_parallel_region(local, group=tensor_parallel_group())
    return whole[..., : model.shape.vocab_size].float()
