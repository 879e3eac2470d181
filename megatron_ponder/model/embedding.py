"""Token embeddings and learned positions, apart from each other.

megatron-core's LanguageModelEmbedding adds the positions to the token embeddings. Here thoughts
take positions too, and token embeddings are scaled before they do, so the two are separate calls.
Names of parameters are megatron-core's.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ponder.kernels.dispatch import uses_triton
from megatron_ponder.kernels.interleave import embed_and_interleave
from megatron_ponder.model.context_parallel import local_shard


def rounded_scale(scale: float | None, dtype: torch.dtype) -> float | None:
    """The factor as a number of the weight's dtype, as the reference multiplies by it."""
    return None if scale is None else torch.tensor(scale, dtype=dtype).item()


def append_extra_tokens(tokens: Tensor, extra_ids: tuple[int, ...]) -> Tensor:
    """Put the same ids behind every token: [b, s] -> [b, s * (1 + extra ids)]."""
    # Filled on the device: a tensor made of numbers would be copied there, and the copy waited for.
    extra = [torch.full_like(tokens, extra_id) for extra_id in extra_ids]
    # [b, s, 1 + extra ids] -> [b, s * (1 + extra ids)]
    return torch.stack((tokens, *extra), dim=2).flatten(1)


class PonderEmbedding(MegatronModule):
    """Scaled token embeddings, and one learned vector per token position shared by all its slots.

    Args:
        config: megatron-core's config.
        vocab_size: padded number of rows over all tensor-parallel ranks.
        num_positions: rows of the table of learned positions; None: there is none (rotary).
        scale: factor on token embeddings, from `rounded_scale`; None: 1.
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
        self.word_embeddings = ScaledEmbedding(
            scale=scale,
            num_embeddings=vocab_size,
            embedding_dim=config.hidden_size,
            init_method=config.embedding_init_method,
            reduce_scatter_embeddings=config.sequence_parallel,
            config=config,
            tp_group=self.tp_group,
        )
        self.position_embeddings: LearnedPositions | None = None
        if num_positions is not None:
            self.position_embeddings = LearnedPositions(config, num_positions, pg_collection)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scaled token embeddings.

        Args:
            tokens: int64 [b, s].

        Returns:
            [s, b, h]; under sequence parallelism this rank's contiguous [s / tp, b, h].
        """
        embeddings: Tensor = self.word_embeddings(tokens)
        if self.training and self.config.hidden_dropout > 0:
            embeddings = self._dropout(embeddings)
        return embeddings

    def add_positions(
        self, slots: Tensor, slots_per_token: int, positions: Tensor | None = None
    ) -> Tensor:
        """Add to every slot the learned position of its token; nothing if positions are rotary.

        Args:
            slots: [s * slots_per_token, b, h], interleaved (this rank's shard).
            slots_per_token: slots per token.
            positions: int64 [b], the position of the one token of each row. None: the tokens are a
                text from position 0.
        """
        if self.position_embeddings is None:
            return slots
        if positions is not None:
            return slots + self.position_embeddings.weight[positions]
        moved: Tensor = self.position_embeddings(slots, slots_per_token)
        return moved

    def _dropout(self, embeddings: Tensor) -> Tensor:
        """Dropout, with a different mask on each rank if ranks hold different slots."""
        if not self.config.sequence_parallel:
            return F.dropout(embeddings, p=self.config.hidden_dropout)
        with tensor_parallel.get_cuda_rng_tracker().fork():
            return F.dropout(embeddings, p=self.config.hidden_dropout)


class ScaledEmbedding(tensor_parallel.VocabParallelEmbedding):
    """megatron-core's embedding times a factor, in the layers' order of dims.

    With Triton lookup, factor, order of dims and the zeros for other ranks' rows are one pass over
    memory.

    Args:
        scale: factor; None: 1.
        more: VocabParallelEmbedding's.
    """

    def __init__(self, *, scale: float | None, **more: Any) -> None:
        super().__init__(**more)
        self.scale = scale

    def forward(self, input_: Tensor) -> Tensor:
        """Tokens int64 [b, s] -> [s, b, h], this rank's [s / tp, b, h] under SP."""
        if uses_triton():
            return self._look_up(input_)
        embeddings: Tensor = super().forward(input_)
        if not self.reduce_scatter_embeddings:
            embeddings = embeddings.transpose(0, 1).contiguous()
        return embeddings if self.scale is None else embeddings * self.scale

    def _look_up(self, tokens: Tensor) -> Tensor:
        """`forward` with Triton. Exactly one rank has each row, so the sum over ranks is exact."""
        rows = embed_and_interleave(
            tokens, self.weight, None, scale=self.scale, first_row=self.vocab_start_index
        )
        if self.reduce_scatter_embeddings:
            reduce = tensor_parallel.reduce_scatter_to_sequence_parallel_region
        else:
            reduce = tensor_parallel.reduce_from_tensor_model_parallel_region
        embeddings: Tensor = reduce(rows, group=self.tp_group)
        return embeddings


class LearnedPositions(torch.nn.Module):
    """A table with one vector per token position.

    Args:
        config: megatron-core's config.
        num_positions: rows.
        pg_collection: process groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_positions: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.empty(
                num_positions,
                config.hidden_size,
                dtype=config.params_dtype,
                device=torch.cuda.current_device(),
            )
        )
        # Each rank reads the rows of its own slots: gradients are partial sums, as for norms.
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)
        self._cp_group = pg_collection.cp
        self._tp_group = pg_collection.tp if config.sequence_parallel else None

    def forward(self, slots: Tensor, slots_per_token: int) -> Tensor:
        """[s * slots_per_token, b, h] (this rank's shard) plus the vector of each slot's token."""
        num_slots, b, h = slots.shape
        num_tokens = num_slots // slots_per_token
        positions = self._local_rows(num_tokens)
        # [s*n, b, h] -> [s, n, b, h], plus [s, 1, 1, h]
        by_token = slots.view(num_tokens, slots_per_token, b, h) + positions[:, None, None, :]
        return by_token.view(num_slots, b, h)

    def _local_rows(self, num_tokens: int) -> Tensor:
        """The rows of this rank's tokens, [num_tokens, h]: its share of its context shard."""
        tp_size = self._tp_group.size() if self._tp_group is not None else 1
        whole = self.weight[: num_tokens * tp_size * self._cp_group.size()]
        rows = local_shard(whole, dim=0, group=self._cp_group)
        if self._tp_group is None:
            return rows
        return rows.narrow(0, num_tokens * self._tp_group.rank(), num_tokens)
