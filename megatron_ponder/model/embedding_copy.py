"""A copy of the embedding table on the last pipeline stage, for methods that mix embeddings.

Tied embeddings are on the last stage anyway. Otherwise the last stage keeps a copy that acts as the
same parameter: equal initial weights (drawn by name), gradients summed over both stages
(`parallel.schedule`), one entry in checkpoints, counted once in the gradient norm. megatron-core
does this for tied embeddings only. The attributes set here make it count the parameter once and
shard both copies alike in the distributed optimizer.
"""

from typing import Any

from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from megatron_ponder.runtime.distributed import data_parallel_group

ORIGINAL = "embedding.word_embeddings.weight"
COPY = "embedding_copy.weight"


class EmbeddingCopy(tensor_parallel.VocabParallelEmbedding):
    """The last stage's copy, used as a matrix; no token is looked up in it.

    Args:
        config: megatron-core's config.
        vocab_size: padded number of rows over all tensor-parallel ranks.
        pg_collection: process groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        vocab_size: int,
        pg_collection: ProcessGroupCollection,
    ) -> None:
        super().__init__(
            num_embeddings=vocab_size,
            embedding_dim=config.hidden_size,
            init_method=config.embedding_init_method,
            config=config,
            tp_group=pg_collection.tp,
        )
        mark_as_replicated(self.weight, is_copy=True)

    def forward(self) -> Tensor:
        """The local table, [v / tp, h].

        Call the module to get it: with --overlap-param-gather megatron-core completes a module's
        weights in a hook of its call.
        """
        weight: Tensor = self.weight
        return weight

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """The table under the original's key, as a replica that is not written."""
        assert metadata is not None and not sharded_offsets
        model_prefix = prefix.removesuffix("embedding_copy.")
        weight = make_tp_sharded_tensor_for_checkpoint(
            tensor=self.weight,
            key=model_prefix + ORIGINAL,
            replica_id=(1, 0, data_parallel_group().rank()),
            allow_shape_mismatch=True,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return {model_prefix + COPY: weight}


def mark_as_replicated(weight: Tensor, *, is_copy: bool) -> None:
    """Tell megatron-core that a parameter is on the first and on the last pipeline stage."""
    setattr(weight, "shared_embedding", True)
    if is_copy:
        setattr(weight, "shared", True)
