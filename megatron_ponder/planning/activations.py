"""What a forward keeps for its backward, counted tensor by tensor from our layers.

For b sequences of S slots, of which R are read, a layer keeps (h hidden size, a query width, g key
width, f MLP width, f' width before the activation; all local to the rank):

    input, norm 1, QKV's input       S h, statistics of S rows, S h
    with norms of heads              S (a + 2 g), statistics of S heads and groups
    queries, keys, values            S (a + 2 g)
    attention's output and row sums  S a, S heads in fp32
    the output as the projection reads it   S a, a copy with rotary positions (SDPA's output has
                                     its queries' layout, and the rotation's is heads first) and
                                     with context parallelism (two halves are joined)
    residual, norm 2, MLP's input    R h (none with a parallel residual), R rows, R h
    activation's input and output    R f', R f

R = S in all layers but the model's last. Selective recomputation keeps no input of QKV or MLP, no
output of the activation, and of the attention's output no copy but one of the slots that are read
or of joined halves. Sequence parallelism divides the tensors of width h over the tensor-parallel
ranks; the other widths are local already. Behind the last layer: the final
norm's input and, in the last pass, the head's input and the softmax in fp32 (none with the fused
loss).

Kept in the dtype of the run, unless said otherwise. torch's RMSNorm in bf16 on CPU keeps two fp32
copies more, which CUDA's fused one does not: not counted. Dropout keeps a byte per element
(CUDA's). Left out: the allocator's rounding and fragmentation, and memory of the libraries.
"""

import dataclasses

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.model.linear_cross_entropy import MAX_CHUNK_BYTES
from megatron_ponder.planning.shards import FP32_BYTES, Shards, shards_of
from megatron_ponder.ponder.chunks import Chunk
from megatron_ponder.ponder.plan import Pass

MASK_BYTES = 1
INT64_BYTES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class ActivationCounter:
    """Bytes kept by parts of the model for one micro-batch on one rank."""

    config: ResolvedConfig
    """Resolved."""
    shards: Shards

    @classmethod
    def of(cls, config: ResolvedConfig) -> "ActivationCounter":
        """For a resolved run."""
        return cls(config=config, shards=shards_of(config))

    def rows(self, slots_per_token: int) -> int:
        """Slots of a micro-batch that hold `slots_per_token` per token."""
        return slots_per_token * self.shards.tokens * self.shards.micro_batch_size

    def hidden_bytes(self, slots_per_token: int) -> int:
        """One tensor of the residual stream."""
        size = self.shards
        rows = self.rows(slots_per_token) // size.sequence_shards
        return rows * size.hidden_size * size.element_bytes

    def layer_bytes(self, pass_: Pass, *, is_last_layer: bool) -> int:
        """What one layer keeps."""
        read = pass_.outputs_per_token if is_last_layer else pass_.slots_per_token
        return self._attention_bytes(pass_, read) + self._mlp_bytes(pass_, read)

    def _attention_bytes(self, pass_: Pass, num_read: int) -> int:
        """Norm 1 to the input of the output projection."""
        size = self.shards
        rows = self.rows(pass_.slots_per_token)
        kept = self._norm_bytes(pass_.slots_per_token)
        kept += rows * (2 * size.attention_width + 2 * size.key_value_width) * size.element_bytes
        kept += rows * size.num_heads * FP32_BYTES
        if self.config.model.qk_layernorm:
            kept += self._head_norm_bytes(rows)
        if size.context_parallel_size > 1:
            kept += self._gathered_bytes(rows)
        # One stage of several is a view of the whole; more than one are copied.
        is_copied = size.rotated_channels > 0 or size.context_parallel_size > 1
        if self._is_selective and num_read == pass_.slots_per_token:
            is_copied = size.context_parallel_size > 1
        if 1 < num_read < pass_.slots_per_token:
            rows, is_copied = self.rows(num_read), True
        if is_copied:
            kept += rows * size.attention_width * size.element_bytes
        return kept

    @property
    def _is_selective(self) -> bool:
        return self.config.training.recompute_granularity == "selective"

    def _norm_bytes(self, slots_per_token: int, *, is_input_kept: bool = True) -> int:
        """A norm's input and statistics, and its output unless that is made again."""
        num_kept = is_input_kept + (not self._is_selective)
        return num_kept * self.hidden_bytes(slots_per_token) + self._statistics_bytes(
            slots_per_token
        )

    def _head_norm_bytes(self, rows: int) -> int:
        """The joint projection before the norms of queries and keys, and a number or two a head."""
        size, model = self.shards, self.config.model
        num_heads = size.num_heads + size.num_heads * model.num_query_groups // (
            model.num_attention_heads
        )
        count = 2 if model.normalization == "LayerNorm" else 1
        projection = (size.attention_width + 2 * size.key_value_width) * size.element_bytes
        return rows * (projection + count * num_heads * FP32_BYTES)

    def _gathered_bytes(self, rows: int) -> int:
        """Keys and values of the other ranks' tokens."""
        size = self.shards
        others = size.context_parallel_size - 1
        return others * rows * 2 * size.key_value_width * size.element_bytes

    def _mlp_bytes(self, pass_: Pass, num_read: int) -> int:
        """Norm 2 to the input of the second projection."""
        size = self.shards
        is_kept_apart = (
            not self.config.model.parallel_residual or 1 < num_read < pass_.slots_per_token
        )
        kept = self._norm_bytes(num_read, is_input_kept=is_kept_apart)
        width = size.ffn_input_width + (0 if self._is_selective else size.ffn_width)
        kept += self.rows(num_read) * width * size.element_bytes
        if self.config.model.hidden_dropout > 0:
            masks = self.hidden_bytes(num_read) + self.hidden_bytes(num_read)
            kept += masks // size.element_bytes * MASK_BYTES
        return kept

    def _statistics_bytes(self, slots_per_token: int) -> int:
        """A norm's numbers per row: RMSNorm one, LayerNorm two."""
        count = 2 if self.config.model.normalization == "LayerNorm" else 1
        return count * self.rows(slots_per_token) // self.shards.sequence_shards * FP32_BYTES

    def rotary_bytes(self, pass_: Pass) -> int:
        """The table of a pass, which all its layers share."""
        size = self.shards
        return pass_.slots_per_token * size.tokens * size.rotated_channels * size.element_bytes

    def final_norm_bytes(self, pass_: Pass) -> int:
        """The norm behind the last layer."""
        if not pass_.final_norm:
            return 0
        read = pass_.outputs_per_token
        return self.hidden_bytes(read) + self._statistics_bytes(read)

    def head_bytes(self) -> int:
        """Output layer and loss: its input, the softmax, masks and targets.

        The fused loss keeps a number per token instead of the softmax.
        """
        size = self.shards
        if self.config.backend.cross_entropy_loss_fusion:
            return self.hidden_bytes(1) + self.rows(1) * (FP32_BYTES + INT64_BYTES)
        softmax = self.rows(1) * size.vocab_rows * FP32_BYTES
        return self.hidden_bytes(1) + softmax + self.rows(1) * (MASK_BYTES + INT64_BYTES)

    def loss_chunk_rows(self) -> int:
        """Rows of logits that the fused loss makes at a time."""
        size = self.shards
        given = self.config.backend.loss_chunk_tokens
        fitting = max(1, MAX_CHUNK_BYTES // (size.vocab_rows * size.element_bytes))
        return min(self.rows(1), given or fitting)

    def mixture_bytes(self, pass_: Pass) -> int:
        """A mixture of embeddings: the output layer's input, the probabilities, the mixture."""
        if not pass_.mixes_embeddings:
            return 0
        read, size = pass_.outputs_per_token, self.shards
        probabilities = self.rows(read) * size.vocab_rows * size.element_bytes
        return probabilities + 2 * self.hidden_bytes(read)

    def carry_bytes(self, chunk: Chunk) -> int:
        """What the last stage hands on from a chunk."""
        return self.hidden_bytes(chunk.handed_on_per_token)
