"""What a forward keeps for its backward, counted tensor by tensor from our layers.

For b sequences of S slots, of which U are output slots, a layer keeps (h hidden size, a query
width, g key width, f MLP width, f' width before the activation; all local to the rank):

    input, norm 1, QKV's input       S h, statistics of S rows, S h
    with norms of heads              S (a + 2 g), statistics of S heads and groups
    queries, keys, values            S (a + 2 g)
    attention's output and row sums  S a, S heads in fp32
    input of the output projection   S a: a copy with rotary positions (SDPA's output has the layout
                                     of its queries, and the rotation's is heads first) and with
                                     context parallelism (two halves are joined)
    residual, norm 2, MLP's input    U h (none with a parallel residual), U rows, U h
    activation's input and output    U f', U f

U = S in all layers but the model's last. Selective recompute drops the inputs of QKV and MLP, the
output of the activation, and the copy of the attention's output, unless it is one of output slots
or of joined halves. Sequence parallelism divides the tensors of width h over the tensor-parallel
ranks; the other widths are local already. Behind the last layer: the final norm's input and, in the
last pass, the head's input and the softmax in fp32 (none with the fused loss).

Tensors have the run's dtype unless stated otherwise. Dropout keeps a byte per element, as on CUDA.
Left out: the allocator's rounding and fragmentation, memory of the libraries, and two fp32 copies
that torch's RMSNorm in bf16 keeps on CPU but not on CUDA.
"""

from megatron_ponder.model.linear_cross_entropy import default_chunk_tokens
from megatron_ponder.planning.run import FP32_BYTES, Stage
from megatron_ponder.ponder.chunks import Chunk
from megatron_ponder.ponder.plan import Pass

MASK_BYTES = 1
INT64_BYTES = 8


class StageActivations(Stage):
    """Bytes that the parts of the model keep on a rank for one micro-batch."""

    @property
    def is_selective(self) -> bool:
        """Whether activations that need no matmul are recomputed."""
        return self.run.config.training.recompute_granularity == "selective"

    def layers_bytes(self, chunk: Chunk) -> list[int]:
        """What each layer of a chunk keeps, in order, if it is not recomputed."""
        pass_ = chunk.pass_
        layers = [self._layer_bytes(pass_, pass_.slots_per_token)] * self.layers_per_chunk
        if self.ends_pass(chunk):
            layers[-1] = self._layer_bytes(pass_, pass_.outputs_per_token)
        return layers

    def _layer_bytes(self, pass_: Pass, num_outputs: int) -> int:
        return self._attention_bytes(pass_, num_outputs) + self._mlp_bytes(pass_, num_outputs)

    def _attention_bytes(self, pass_: Pass, num_outputs: int) -> int:
        """Norm 1 to the input of the output projection."""
        size, rows = self.size, self.rows(pass_.slots_per_token)
        context_parallel_size = self.run.config.parallel.context_parallel_size
        kept = self._norm_bytes(pass_.slots_per_token)
        kept += rows * (2 * size.attention_width + 2 * size.key_value_width) * size.element_bytes
        kept += rows * size.num_heads * FP32_BYTES
        if self.run.config.model.qk_layernorm:
            kept += self._head_norm_bytes(rows)
        kept += self.gathered_key_value_bytes(pass_)
        # One output slot of several is a view of the whole; more than one are copied.
        is_copied = size.rotated_channels > 0 or context_parallel_size > 1
        if self.is_selective and num_outputs == pass_.slots_per_token:
            is_copied = context_parallel_size > 1
        if 1 < num_outputs < pass_.slots_per_token:
            rows, is_copied = self.rows(num_outputs), True
        if is_copied:
            kept += rows * size.attention_width * size.element_bytes
        return kept

    def _norm_bytes(self, slots_per_token: int, *, is_input_kept: bool = True) -> int:
        """A norm's input and statistics, and its output unless that is recomputed."""
        num_kept = is_input_kept + (not self.is_selective)
        kept = num_kept * self.hidden_bytes(slots_per_token)
        return kept + self._statistics_bytes(slots_per_token)

    @property
    def _statistics_per_row(self) -> int:
        return 2 if self.run.config.model.normalization == "LayerNorm" else 1

    def _statistics_bytes(self, slots_per_token: int) -> int:
        """A norm's numbers per row: RMSNorm one, LayerNorm two."""
        rows = self._statistics_per_row * self.rows(slots_per_token)
        return rows // self.size.sequence_shards * FP32_BYTES

    def _head_norm_bytes(self, rows: int) -> int:
        """The joint projection before the norms of heads, and statistics of each head."""
        size, model = self.size, self.run.config.model
        num_heads = size.num_heads + size.key_value_width // model.kv_channels
        projection = (size.attention_width + 2 * size.key_value_width) * size.element_bytes
        return rows * (projection + self._statistics_per_row * num_heads * FP32_BYTES)

    def _mlp_bytes(self, pass_: Pass, num_outputs: int) -> int:
        """Norm 2 to the input of the second projection."""
        size, model = self.size, self.run.config.model
        is_copy = 1 < num_outputs < pass_.slots_per_token
        is_input_kept = is_copy or not model.parallel_residual
        kept = self._norm_bytes(num_outputs, is_input_kept=is_input_kept)
        width = size.ffn_input_width + (0 if self.is_selective else size.ffn_width)
        kept += self.rows(num_outputs) * width * size.element_bytes
        if model.hidden_dropout > 0:
            kept += 2 * self.hidden_bytes(num_outputs) // size.element_bytes * MASK_BYTES
        return kept

    def rotary_bytes(self, pass_: Pass) -> int:
        """The table of a pass, which all its layers share."""
        positions = self.rows(pass_.slots_per_token) // self.run.config.training.micro_batch_size
        return positions * self.size.rotated_channels * self.size.element_bytes

    def pass_end_bytes(self, chunk: Chunk) -> int:
        """From the last layer to the carry, if the pass ends here: final norm and mixture.

        A mixture keeps the input of the output layer, the probabilities and the result.
        """
        if not self.ends_pass(chunk):
            return 0
        pass_, size = chunk.pass_, self.size
        hidden = self.hidden_bytes(pass_.outputs_per_token)
        kept = 0
        if pass_.final_norm:
            kept += hidden + self._statistics_bytes(pass_.outputs_per_token)
        if pass_.mixes_embeddings:
            probabilities = self.rows(pass_.outputs_per_token) * size.vocab_rows
            kept += probabilities * size.element_bytes + 2 * hidden
        return kept

    def head_bytes(self, chunk: Chunk) -> int:
        """Output layer and loss, if they are here: the input, the softmax, masks and targets.

        The fused loss keeps a number per token instead of the softmax.
        """
        if not self.has_loss(chunk):
            return 0
        if self.run.config.backend.cross_entropy_loss_fusion:
            return self.hidden_bytes(1) + self.rows(1) * (FP32_BYTES + INT64_BYTES)
        softmax = self.rows(1) * self.size.vocab_rows * FP32_BYTES
        return self.hidden_bytes(1) + softmax + self.rows(1) * (MASK_BYTES + INT64_BYTES)

    def loss_chunk_rows(self) -> int:
        """Rows of logits that the fused loss computes at a time."""
        given = self.run.config.backend.loss_chunk_tokens
        default = default_chunk_tokens(self.size.vocab_rows, self.size.element_bytes)
        return min(self.rows(1), given or default)
