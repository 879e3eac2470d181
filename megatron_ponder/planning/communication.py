"""Bytes that a rank sends in one step, by what they are for.

Collectives are counted as rings do them, over d ranks and n bytes: an all-reduce sends
2 n (d-1)/d, an all-gather or reduce-scatter to or from n bytes n (d-1)/d. Counted are activations,
gradients, weights and mixtures of embeddings; not counted are single numbers per token (the loss)
or per step.
"""

import dataclasses

from megatron_ponder.model.size import head_norm_parameters, linear_biases, norm_parameters
from megatron_ponder.planning.memory import has_embedding_copy, local_parameters
from megatron_ponder.planning.run import FP32_BYTES, PlannedRun, Stage
from megatron_ponder.ponder.chunks import Chunk


@dataclasses.dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes sent by one rank of a stage in one step."""

    tensor: int
    """Among ranks that share layers."""
    context: int
    """Keys and values among ranks that share sequences."""
    pipeline: int
    """Activations to the next stage and gradients to the previous one."""
    data: int
    """Gradients, and weights with the distributed optimizer, among replicas."""
    embedding: int
    """Gradients of tied embeddings between first and last stage."""


def stage_traffic(run: PlannedRun) -> list[Traffic]:
    """Traffic by stage."""
    times, result = run.num_microbatches, []
    for index in range(run.num_stages):
        stage = StageTraffic(run, index)
        result.append(
            Traffic(
                tensor=times * sum(map(stage.tensor_bytes, run.chunks))
                + stage.replicated_gradient_bytes(),
                context=times * sum(map(stage.context_bytes, run.chunks)),
                pipeline=times * sum(map(stage.pipeline_bytes, run.chunks)),
                data=stage.data_bytes(),
                embedding=stage.embedding_bytes(),
            )
        )
    return result


class StageTraffic(Stage):
    """One stage's traffic, chunk by chunk."""

    @property
    def tensor_share(self) -> float:
        """Bytes that a gather or scatter over tensor-parallel ranks sends, of the whole tensor."""
        size = self.run.config.parallel.tensor_model_parallel_size
        return (size - 1) / size

    def _num_forwards(self, chunk: Chunk) -> float:
        """Forwards of the chunk's layers, recomputed ones included."""
        if self.recomputes_pass(chunk):
            return 2.0
        return 1.0 + sum(map(len, self.recomputed_units(chunk))) / self.layers_per_chunk

    def gathered_bytes(self, slots_per_token: int) -> int:
        """One tensor of the residual stream, gathered from the sequence shards."""
        return self.hidden_bytes(slots_per_token) * self.size.sequence_shards

    def tensor_bytes(self, chunk: Chunk) -> int:
        """Of one micro-batch, as multiples of one gather or scatter of the residual stream."""
        is_sharded = self.run.config.parallel.sequence_parallel
        inside, one_slot = self.gathered_bytes(chunk.pass_.slots_per_token), self.gathered_bytes(1)
        # Two modules, each with an all-reduce or a gather and a scatter; under sequence
        # parallelism the backward gathers the modules' inputs once more.
        backward = (6 if is_sharded else 4) if chunk.has_grad else 0
        amount = (4 * self._num_forwards(chunk) + backward) * inside
        amount *= self.layers_per_chunk
        if self.ends_pass(chunk):
            # In the last layer all but QKV's input has only the output slots.
            less = (3 if is_sharded else 4) * self._num_forwards(chunk)
            less += (4 if is_sharded else 2) if chunk.has_grad else 0
            amount -= less * (inside - self.gathered_bytes(chunk.pass_.outputs_per_token))
            if chunk.pass_.mixes_embeddings:
                amount += self._mixture_bytes(chunk)
        if self.has_loss(chunk):
            amount += (3 if is_sharded else 2) * one_slot
        if self.builds_input(chunk) and (self.run.num_stages > 1 or chunk.index == 0):
            embedded = one_slot * (1 + len(self.run.method.extra_token_ids))
            amount += (2 if is_sharded and chunk.has_grad else 1 if is_sharded else 2) * embedded
        return round(amount * self.tensor_share)

    def _mixture_bytes(self, chunk: Chunk) -> float:
        """Of one micro-batch: mixtures and the output layer's gradient, and a softmax's numbers."""
        is_sharded = self.run.config.parallel.sequence_parallel
        outputs = self.gathered_bytes(chunk.pass_.outputs_per_token)
        numbers = self.rows(chunk.pass_.outputs_per_token) * FP32_BYTES
        # The largest logit and the sum are all-reduced; the backward gathers one number if sharded.
        num_mixtures = 2 if self.recomputes_pass(chunk) else 1
        amount = num_mixtures * (2 * outputs + 4 * numbers)
        if chunk.has_grad:
            amount += 3 * outputs + numbers if is_sharded else 2 * outputs
        return amount

    def replicated_gradient_bytes(self) -> int:
        """Gradients that tensor-parallel ranks add up.

        Those of the norms of heads; under sequence parallelism those of all norms, some biases and
        learned positions too.
        """
        model = self.run.config.model
        count = self.num_layers * head_norm_parameters(model)
        if self.run.config.parallel.sequence_parallel:
            norm = norm_parameters(model, model.hidden_size)
            _, has_bias_after_attention, _, has_bias_after_mlp = linear_biases(model)
            biases = model.hidden_size * (has_bias_after_attention + has_bias_after_mlp)
            count += self.num_layers * (2 * norm + biases)
            if self.is_last:
                count += norm
            if self.is_first and model.position_embedding_type == "learned_absolute":
                count += model.max_position_embeddings * model.hidden_size
        return round(2 * count * FP32_BYTES * self.tensor_share)

    def context_bytes(self, chunk: Chunk) -> int:
        """Of one micro-batch: keys and values gathered, their gradients scattered."""
        times = self._num_forwards(chunk) + (1 if chunk.has_grad else 0)
        return round(times * self.layers_per_chunk * self.gathered_key_value_bytes(chunk.pass_))

    def pipeline_bytes(self, chunk: Chunk) -> int:
        """Of one micro-batch: the chunk's output, and its input's gradient."""
        return sum(self.message_bytes(chunk, is_backward=backward) for backward in (False, True))

    def data_bytes(self) -> int:
        """Gradients in fp32 to all replicas; with the distributed optimizer, weights back."""
        size = self.run.replicas * self.run.config.parallel.context_parallel_size
        sent = local_parameters(self) * (FP32_BYTES + self.returned_bytes)
        return round(sent * (size - 1) / size)

    @property
    def returned_bytes(self) -> int:
        """Of a parameter: what comes back after its gradient was reduced.

        An all-reduce is a reduction and a gather of the same size.
        """
        is_distributed = self.run.config.parallel.use_distributed_optimizer
        return self.size.element_bytes if is_distributed else FP32_BYTES

    def embedding_bytes(self) -> int:
        """An all-reduce between two ranks sends the table once."""
        is_tied = not self.run.config.model.untie_embeddings_and_output_weights
        is_replicated = is_tied or has_embedding_copy(self.run)
        if not is_replicated or self.is_first == self.is_last:
            return 0
        return self.size.vocab_rows * self.size.hidden_size * FP32_BYTES
