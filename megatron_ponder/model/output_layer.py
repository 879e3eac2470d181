"""The output layer, from hidden states to logits or straight to the loss.

megatron-core's layer with a second mode for the fused loss. Both modes are calls of the module,
since with --overlap-param-gather megatron-core completes a module's weights in a hook of its call.
"""

from typing import Any

from megatron.core import tensor_parallel
from torch import Tensor

from megatron_ponder.model.linear_cross_entropy import linear_cross_entropy


class OutputLayer(tensor_parallel.ColumnParallelLinear):
    """megatron-core's ColumnParallelLinear to the vocabulary.

    Args:
        vocab_size: rows that are no padding.
        loss_chunk_tokens: see `linear_cross_entropy`.
        arguments: ColumnParallelLinear's.
    """

    def __init__(
        self, *arguments: Any, vocab_size: int, loss_chunk_tokens: int | None, **more: Any
    ) -> None:
        super().__init__(*arguments, **more)
        self.vocab_size = vocab_size
        self.loss_chunk_tokens = loss_chunk_tokens

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        labels: Tensor | None = None,
    ) -> Any:
        """Logits and None, as megatron-core's layer; with labels the loss of each token.

        Args:
            input_: hidden states [s, b, h], this rank's under sequence parallelism.
            weight: the embedding's, if tied; None: this layer's own.
            runtime_gather_output: as megatron-core's.
            labels: int64 [s, b]; None for logits.
        """
        if labels is None:
            return super().forward(input_, weight, runtime_gather_output)
        return linear_cross_entropy(
            input_,
            self.weight if weight is None else weight,
            labels,
            vocab_size=self.vocab_size,
            tp_group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
            chunk_tokens=self.loss_chunk_tokens,
        )
