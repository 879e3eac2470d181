"""Bytes that a rank sends in one step, by what they are for.

Collectives are counted as rings do them, over d ranks and n bytes: an all-reduce sends
2 n (d-1)/d, an all-gather or reduce-scatter to or from n bytes n (d-1)/d. Counted are activations,
gradients, weights and mixtures of embeddings; not counted are single numbers per token (the loss)
or per step.
"""

import dataclasses

from megatron_ponder.config.layout import data_parallel_size
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.model.size import head_norm_parameters, linear_biases
from megatron_ponder.planning.activations import ActivationCounter
from megatron_ponder.planning.memory import count_local_parameters, has_embedding_copy
from megatron_ponder.planning.shards import FP32_BYTES, layers_by_stage
from megatron_ponder.ponder.chunks import Chunk, cut_into_chunks
from megatron_ponder.ponder.method import load_method
from megatron_ponder.ponder.plan import PassPlan


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


def stage_traffic(
    config: ResolvedConfig, plan: PassPlan, world_size: int, num_microbatches: int
) -> list[Traffic]:
    """Traffic by stage.

    Args:
        config: resolved.
        plan: the passes.
        world_size: ranks.
        num_microbatches: of a step on each data-parallel rank.
    """
    num_pipeline_stages = config.parallel.pipeline_model_parallel_size
    chunks = cut_into_chunks(plan, config.parallel.num_virtual_stages_per_pipeline_rank)
    result = []
    for stage in range(num_pipeline_stages):
        counter = StageTraffic(config, plan, stage)
        result.append(
            Traffic(
                tensor=num_microbatches * sum(map(counter.tensor_bytes, chunks))
                + counter.replicated_gradient_bytes(),
                context=num_microbatches * sum(map(counter.context_bytes, chunks)),
                pipeline=num_microbatches
                * sum(counter.pipeline_bytes(chunk, len(chunks)) for chunk in chunks),
                data=counter.data_bytes(world_size),
                embedding=counter.embedding_bytes(),
            )
        )
    return result


class StageTraffic:
    """One stage's traffic, chunk by chunk."""

    def __init__(self, config: ResolvedConfig, plan: PassPlan, stage: int) -> None:
        self.config, self.plan, self.stage = config, plan, stage
        self.num_pipeline_stages = config.parallel.pipeline_model_parallel_size
        self.layers = layers_by_stage(config)[stage]
        self.counter = ActivationCounter.of(config)
        size = config.parallel.tensor_model_parallel_size
        self.tensor_share = (size - 1) / size

    def _is_end(self, chunk: Chunk) -> bool:
        return self.stage == self.num_pipeline_stages - 1 and chunk.is_last_of_pass

    def _is_start(self, chunk: Chunk) -> bool:
        return self.stage == 0 and chunk.layer_chunk == 0

    def _num_forwards(self, chunk: Chunk) -> float:
        """Forwards of the chunk's layers, recomputed ones included."""
        training, num_layers = self.config.training, self.layers[chunk.layer_chunk]
        if self.plan.is_recomputed(chunk.pass_, training):
            return 2.0
        if not chunk.has_grad or training.recompute_granularity != "full":
            return 1.0
        if training.recompute_method == "block":
            return 1.0 + min(training.recompute_num_layers, num_layers) / num_layers
        return 2.0

    def tensor_bytes(self, chunk: Chunk) -> int:
        """Of one micro-batch, as multiples of one gather or scatter of the residual stream."""
        is_sharded = self.config.parallel.sequence_parallel
        shards = self.counter.shards.sequence_shards
        inside = self.counter.hidden_bytes(chunk.pass_.slots_per_token) * shards
        one_stage = self.counter.hidden_bytes(1) * shards
        # Two modules, each with an all-reduce or a gather and a scatter; under sequence
        # parallelism the backward gathers the modules' inputs once more.
        backward = (6 if is_sharded else 4) if chunk.has_grad else 0
        amount = (4 * self._num_forwards(chunk) + backward) * inside
        amount *= self.layers[chunk.layer_chunk]
        if self._is_end(chunk):
            # In the last layer all but QKV's input has only the slots that are read.
            read = self.counter.hidden_bytes(chunk.pass_.outputs_per_token) * shards
            less = (3 if is_sharded else 4) * self._num_forwards(chunk)
            less += (4 if is_sharded else 2) if chunk.has_grad else 0
            amount -= less * (inside - read)
        if self._is_end(chunk) and self.plan.is_last(chunk.pass_):
            amount += (3 if is_sharded else 2) * one_stage
        if self._is_start(chunk) and (self.num_pipeline_stages > 1 or chunk.index == 0):
            embedded = one_stage * (1 + len(load_method(self.config.method).extra_token_ids))
            amount += (2 if is_sharded and chunk.has_grad else 1 if is_sharded else 2) * embedded
        if self._is_end(chunk) and chunk.pass_.mixes_embeddings:
            amount += self._mixture_bytes(chunk)
        return round(amount * self.tensor_share)

    def _mixture_bytes(self, chunk: Chunk) -> float:
        """Of one micro-batch: mixtures and the output layer's gradient, and a softmax's numbers."""
        is_sharded = self.config.parallel.sequence_parallel
        read = chunk.pass_.outputs_per_token
        slots = self.counter.hidden_bytes(read) * self.counter.shards.sequence_shards
        numbers = self.counter.rows(read) * FP32_BYTES
        # The largest logit and the sum are all-reduced; the backward gathers one number if sharded.
        amount = self._num_mixtures(chunk) * (2 * slots + 4 * numbers)
        if chunk.has_grad:
            amount += 3 * slots + numbers if is_sharded else 2 * slots
        return amount

    def _num_mixtures(self, chunk: Chunk) -> int:
        """How often the forward's end is computed."""
        return 2 if self.plan.is_recomputed(chunk.pass_, self.config.training) else 1

    def replicated_gradient_bytes(self) -> int:
        """Gradients that tensor-parallel ranks add up.

        Those of the norms of heads; under sequence parallelism those of all norms, some biases and
        learned positions too.
        """
        model = self.config.model
        of_heads = sum(self.layers) * head_norm_parameters(model)
        if not self.config.parallel.sequence_parallel:
            return round(2 * of_heads * FP32_BYTES * self.tensor_share)
        norm = 2 if model.normalization == "LayerNorm" else 1
        _, has_bias_behind_attention, _, has_bias_behind_mlp = linear_biases(model)
        rows = sum(self.layers) * (2 * norm + has_bias_behind_attention + has_bias_behind_mlp)
        if self.stage == self.num_pipeline_stages - 1:
            rows += norm
        if self.stage == 0 and model.position_embedding_type == "learned_absolute":
            rows += model.max_position_embeddings
        count = rows * model.hidden_size + of_heads
        return round(2 * count * FP32_BYTES * self.tensor_share)

    def context_bytes(self, chunk: Chunk) -> int:
        """Of one micro-batch: keys and values gathered, their gradients scattered."""
        size = self.counter.shards
        rows = self.counter.rows(chunk.pass_.slots_per_token)
        gathered = rows * 2 * size.key_value_width * size.element_bytes
        times = self._num_forwards(chunk) + (1 if chunk.has_grad else 0)
        others = size.context_parallel_size - 1
        return round(times * others * gathered * self.layers[chunk.layer_chunk])

    def pipeline_bytes(self, chunk: Chunk, num_chunks: int) -> int:
        """Of one micro-batch: the chunk's output, and its input's gradient."""
        if self.num_pipeline_stages == 1:
            return 0
        sent = 0
        if self.stage < self.num_pipeline_stages - 1:
            sent += self.counter.hidden_bytes(chunk.sent_per_token)
        elif chunk.index < num_chunks - 1:
            sent += self.counter.carry_bytes(chunk)
        if not chunk.has_grad:
            return sent
        if self.stage > 0:
            return sent + self.counter.hidden_bytes(chunk.sent_per_token)
        before = cut_into_chunks(self.plan, len(self.layers))[chunk.index - 1]
        if chunk.index > 0 and before.has_grad:
            sent += self.counter.carry_bytes(before)
        return sent

    def data_bytes(self, world_size: int) -> int:
        """Gradients in fp32 to all replicas; with the distributed optimizer, weights back."""
        parallel = self.config.parallel
        size = data_parallel_size(self.config, world_size) * parallel.context_parallel_size
        per_parameter = 2 * FP32_BYTES
        if parallel.use_distributed_optimizer:
            per_parameter = FP32_BYTES + self.counter.shards.element_bytes
        count = count_local_parameters(self.config, self.stage)
        return round(count * per_parameter * (size - 1) / size)

    def embedding_bytes(self) -> int:
        """An all-reduce between two ranks sends the table once."""
        is_tied = not self.config.model.untie_embeddings_and_output_weights
        is_replicated = is_tied or has_embedding_copy(self.config)
        if (
            not is_replicated
            or self.num_pipeline_stages == 1
            or self.stage not in (0, self.num_pipeline_stages - 1)
        ):
            return 0
        size = self.counter.shards
        return size.vocab_rows * size.hidden_size * FP32_BYTES
