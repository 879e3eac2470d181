"""Token embeddings and learned positions, apart from each other.

megatron-core's LanguageModelEmbedding adds the positions to the token embeddings. Here thoughts
take positions too, and token embeddings are scaled before they do, so the two are separate calls.
Names of parameters are megatron-core's.
"""

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class PonderEmbedding(MegatronModule):
    """Scaled token embeddings, and one learned vector per token position shared by all its slots.

    Args:
        config: megatron-core's config.
        vocab_size: padded number of rows over all tensor-parallel ranks.
        num_positions: rows of the table of learned positions; None: there is none (rotary).
        scale: factor on token embeddings; None: 1.
        pg_collection: process groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        vocab_size: int,
        num_positions: int | None,
        scale: float | None,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        self.word_embeddings = tensor_parallel.VocabParallelEmbedding(
            num_embeddings=vocab_size,
            embedding_dim=config.hidden_size,
            init_method=config.embedding_init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=self.tp_group,
        )
        # The reference multiplies by a scalar tensor of the weight's dtype.
        weight_dtype = self.word_embeddings.weight.dtype
        self.scale = None if scale is None else torch.tensor(scale, dtype=weight_dtype).item()
        self.position_embeddings: torch.nn.Embedding | None = None
        if num_positions is not None:
            self.position_embeddings = torch.nn.Embedding(
                num_positions,
                config.hidden_size,
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
            # Each rank reads the rows of its own slots: gradients are partial sums, as for norms.
            setattr(self.position_embeddings.weight, "sequence_parallel", config.sequence_parallel)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scaled token embeddings.

        Args:
            tokens: int64 [b, s].

        Returns:
            [s, b, h]; under sequence parallelism this rank's contiguous [s / tp, b, h].
        """
        embeddings = self.word_embeddings(tokens)
        if not self.config.sequence_parallel:
            embeddings = embeddings.transpose(0, 1).contiguous()
        if self.scale is not None:
            embeddings = embeddings * self.scale
        if self.training and self.config.hidden_dropout > 0:
            embeddings = self._dropout(embeddings)
        return embeddings

    def add_positions(self, slots: Tensor, num_stages: int) -> Tensor:
        """Add to every slot the learned position of its token; nothing if positions are rotary.

        Args:
            slots: [s * num_stages, b, h], interleaved (this rank's shard).
            num_stages: slots per token.
        """
        if self.position_embeddings is None:
            return slots
        num_slots, b, h = slots.shape
        num_tokens = num_slots // num_stages
        first = num_tokens * self.tp_group.rank() if self.config.sequence_parallel else 0
        positions = self.position_embeddings.weight[first : first + num_tokens]
        # [s*n, b, h] -> [s, n, b, h], plus [s, 1, 1, h]
        by_token = slots.view(num_tokens, num_stages, b, h) + positions[:, None, None, :]
        return by_token.view(num_slots, b, h)

    def _dropout(self, embeddings: Tensor) -> Tensor:
        """Dropout, with other masks on each rank where ranks hold other slots."""
        if not self.config.sequence_parallel:
            return F.dropout(embeddings, p=self.config.hidden_dropout)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return F.dropout(embeddings, p=self.config.hidden_dropout)
