"""Bytes on each pipeline stage's ranks: weights, gradients, optimizer state, and a step's peak.

What stays between steps: weights in the run's dtype, gradients in fp32, Adam's two moments in fp32
and, in bf16, fp32 masters; the optimizer's part is divided over data-parallel ranks by the
distributed optimizer.

What a step adds: activations from a micro-batch's forward to its backward, in the order in which
megatron-core runs them (order.py), and what a backward needs for a moment: gradients in flight, and
layers that are recomputed. With one stage all passes are one graph, in which torch holds each
weight's gradient from the last pass's backward until the first pass's.

Left out: the allocator's rounding and fragmentation, buffers of communication libraries, the
framework itself (a CUDA context and libraries: about 1 GiB), data loading, evaluation and saving.
"""

import dataclasses
from collections import deque

from megatron_ponder.config.layout import data_parallel_size
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.model.size import head_norm_parameters, linear_biases
from megatron_ponder.planning.activations import ActivationCounter
from megatron_ponder.planning.order import Pipeline
from megatron_ponder.planning.shards import FP32_BYTES, layers_by_stage
from megatron_ponder.ponder.chunks import Chunk, cut_into_chunks, max_sends_kept
from megatron_ponder.ponder.method import load_method
from megatron_ponder.ponder.plan import PassPlan

ADAM_MOMENTS = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Bytes on one rank of a pipeline stage."""

    num_parameters: int
    """Weights on this rank."""
    parameters: int
    gradients: int
    optimizer: int
    activations: int
    """The most that a step adds."""
    num_alive: int
    """Micro-batches times chunks that wait for their backward at that moment."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations


def stage_memory(
    config: ResolvedConfig, plan: PassPlan, world_size: int, num_microbatches: int
) -> list[StageMemory]:
    """Memory by pipeline stage.

    Args:
        config: resolved.
        plan: the passes.
        world_size: ranks.
        num_microbatches: of a step on each data-parallel rank.
    """
    element_bytes = 2 if config.training.bf16 else FP32_BYTES
    state_bytes = FP32_BYTES * (ADAM_MOMENTS + (1 if config.training.bf16 else 0))
    num_sharing = 1
    if config.parallel.use_distributed_optimizer:
        num_sharing = data_parallel_size(config, world_size)
        num_sharing *= config.parallel.context_parallel_size
    result = []
    for stage in range(config.parallel.pipeline_model_parallel_size):
        count = count_local_parameters(config, stage)
        activations, num_alive = _StagePeak(config, plan, num_microbatches, stage).find()
        result.append(
            StageMemory(
                num_parameters=count,
                parameters=count * element_bytes,
                gradients=count * FP32_BYTES,
                optimizer=count * state_bytes // num_sharing,
                activations=activations,
                num_alive=num_alive,
            )
        )
    return result


def count_local_parameters(config: ResolvedConfig, stage: int) -> int:
    """Weights on one rank of a pipeline stage, rows that pad the vocabulary included.

    Args:
        config: resolved.
        stage: the pipeline stage.
    """
    size, model = ActivationCounter.of(config).shards, config.model
    num_pipeline_stages = config.parallel.pipeline_model_parallel_size
    norm = size.hidden_size * (2 if model.normalization == "LayerNorm" else 1)
    count = sum(layers_by_stage(config)[stage]) * (_layer_weights(config) + 2 * norm)
    table = size.vocab_rows * size.hidden_size
    if stage == 0:
        count += table
        if model.position_embedding_type == "learned_absolute":
            count += model.max_position_embeddings * size.hidden_size
    if stage == num_pipeline_stages - 1:
        # Tied embeddings are one table where both ends are on one rank, and a copy where not.
        is_untied = model.untie_embeddings_and_output_weights
        count += norm + (table if is_untied or num_pipeline_stages > 1 else 0)
        count += table if has_embedding_copy(config) else 0
    return count


def has_embedding_copy(config: ResolvedConfig) -> bool:
    """Whether the last stage has the embedding besides an output layer, to mix embeddings."""
    is_alone = config.parallel.pipeline_model_parallel_size == 1
    if is_alone or not config.model.untie_embeddings_and_output_weights:
        return False
    return load_method(config.method).plan(1).mixes_embeddings


def _layer_weights(config: ResolvedConfig) -> int:
    """A layer's linear modules and norms of heads on one rank.

    Biases of row-parallel modules and norms of heads are on every rank.
    """
    size = ActivationCounter.of(config).shards
    qkv_width = size.attention_width + 2 * size.key_value_width
    columns = qkv_width + size.ffn_input_width
    rows = size.attention_width + size.ffn_width
    widths = (qkv_width, size.hidden_size, size.ffn_input_width, size.hidden_size)
    biases = sum(
        width
        for width, is_there in zip(widths, linear_biases(config.model), strict=True)
        if is_there
    )
    return (columns + rows) * size.hidden_size + biases + head_norm_parameters(config.model)


class _StagePeak:
    """Finds the fullest moment of a step on one stage."""

    def __init__(
        self, config: ResolvedConfig, plan: PassPlan, num_microbatches: int, stage: int
    ) -> None:
        parallel = config.parallel
        self.config, self.plan, self.stage = config, plan, stage
        self.num_pipeline_stages = parallel.pipeline_model_parallel_size
        self.num_layer_chunks = parallel.num_virtual_stages_per_pipeline_rank
        self.layers = layers_by_stage(config)[stage]
        self.chunks = cut_into_chunks(plan, self.num_layer_chunks)
        self.counter = ActivationCounter.of(config)
        self.pipeline = Pipeline(
            num_pipeline_stages=self.num_pipeline_stages,
            num_chunks=len(self.chunks),
            num_microbatches=num_microbatches,
        )

    def find(self) -> tuple[int, int]:
        """Bytes, and what is alive then."""
        kept = [self._kept_bytes(chunk) for chunk in self.chunks]
        backward = [self._backward_bytes(chunk) for chunk in self.chunks]
        sent = {False: self._sent_forward_bytes(), True: self._sent_backward_bytes()}
        max_sends = max_sends_kept(self.num_pipeline_stages, len(self.chunks))
        on_the_way = {direction: deque[int](maxlen=max_sends) for direction in sent}
        held = num_alive = most = num_alive_then = 0
        for work in self.pipeline.order(self.stage):
            if not work.is_backward:
                held, num_alive = held + kept[work.chunk], num_alive + 1
            if message := sent[work.is_backward][work.chunk]:
                on_the_way[work.is_backward].append(message)
            now = held + sum(map(sum, on_the_way.values()))
            now += backward[work.chunk] if work.is_backward else 0
            if now > most:
                most, num_alive_then = now, num_alive
            if work.is_backward:
                held, num_alive = held - kept[work.chunk], num_alive - 1
        return most, num_alive_then

    def _sent_forward_bytes(self) -> list[int]:
        """What is sent on after each chunk's forward, and kept by the communicator for a while.

        It is the output that the schedule keeps for the backward, too.
        """
        if self.num_pipeline_stages == 1:
            return [0] * len(self.chunks)
        return [
            0
            if chunk is self.chunks[-1] and self._has_end(chunk)
            else self.counter.carry_bytes(chunk)
            if self.stage == self.num_pipeline_stages - 1
            else self.counter.hidden_bytes(chunk.sent_per_token)
            for chunk in self.chunks
        ]

    def _sent_backward_bytes(self) -> list[int]:
        """What is sent back after each chunk's backward; kept likewise."""
        if self.num_pipeline_stages == 1:
            return [0] * len(self.chunks)
        sent = []
        for chunk in self.chunks:
            before = self.chunks[chunk.index - 1] if chunk.index else None
            if not chunk.has_grad or (self.stage == 0 and (before is None or not before.has_grad)):
                sent.append(0)
            elif self.stage == 0:
                assert before is not None
                sent.append(self.counter.carry_bytes(before))
            else:
                sent.append(self.counter.hidden_bytes(chunk.sent_per_token))
        return sent

    def _has_end(self, chunk: Chunk) -> bool:
        """Whether final norm or loss follow the chunk here."""
        return self.stage == self.num_pipeline_stages - 1 and chunk.is_last_of_pass

    def _has_input(self, chunk: Chunk) -> bool:
        """Whether the pass's input is built here."""
        return self.stage == 0 and chunk.layer_chunk == 0

    def _kept_bytes(self, chunk: Chunk) -> int:
        """From a forward to its backward."""
        kept = self._received_bytes(chunk)
        if not chunk.has_grad:
            return kept
        if self._is_recomputed_whole(chunk):
            return kept + self._pass_input_bytes(chunk)
        kept += self.counter.rotary_bytes(chunk.pass_)
        kept += self._layers_bytes(chunk)
        return kept + self._end_bytes(chunk)

    def _received_bytes(self, chunk: Chunk) -> int:
        """The input that the schedule holds of a chunk until its backward.

        Where it is the input of the first layer, that layer keeps it anyway.
        """
        if self.num_pipeline_stages == 1 or (self.stage == 0 and chunk.index == 0):
            return 0
        if self.stage == 0 and chunk.layer_chunk == 0:
            return self.counter.carry_bytes(self.chunks[chunk.index - 1])
        return 0 if chunk.has_grad else self.counter.hidden_bytes(chunk.sent_per_token)

    def _is_recomputed_whole(self, chunk: Chunk) -> bool:
        """Whether the pass is recomputed from its input."""
        return self.plan.is_recomputed(chunk.pass_, self.config.training)

    def _pass_input_bytes(self, chunk: Chunk) -> int:
        """What a pass is recomputed from."""
        if not self._has_input(chunk):
            return self.counter.hidden_bytes(chunk.sent_per_token)
        # In one graph all passes share the embeddings.
        has_own_embeddings = chunk.index == 0 or self.num_pipeline_stages > 1
        kept = self.counter.hidden_bytes(1) if has_own_embeddings else 0
        if self.num_pipeline_stages == 1 and chunk.index > 0:
            kept += self.counter.carry_bytes(self.chunks[chunk.index - 1])
        return kept

    def _layer_list(self, chunk: Chunk) -> list[int]:
        """What each layer of the chunk here would keep, in order."""
        num_layers = self.layers[chunk.layer_chunk]
        is_end = self._has_end(chunk)
        return [
            self.counter.layer_bytes(chunk.pass_, is_last_layer=is_end and layer == num_layers - 1)
            for layer in range(num_layers)
        ]

    def _units(self, chunk: Chunk) -> tuple[list[int], int]:
        """Bytes of each unit of layers that is recomputed, and of the layers that are not."""
        layers, training = self._layer_list(chunk), self.config.training
        if training.recompute_granularity != "full":
            return [], sum(layers)
        num = training.recompute_num_layers
        if training.recompute_method == "block":
            return layers[:num], sum(layers[num:])
        return [sum(layers[i : i + num]) for i in range(0, len(layers), num)], 0

    def _layers_bytes(self, chunk: Chunk) -> int:
        """What the layers of a chunk keep, with units that are recomputed down to their input."""
        units, rest = self._units(chunk)
        return rest + len(units) * self.counter.hidden_bytes(chunk.pass_.slots_per_token)

    def _end_bytes(self, chunk: Chunk) -> int:
        """Final norm and loss, where they are here."""
        if not self._has_end(chunk):
            return 0
        head = self.counter.head_bytes() if self.plan.is_last(chunk.pass_) else 0
        return self._pass_end_bytes(chunk) + head

    def _pass_end_bytes(self, chunk: Chunk) -> int:
        """What the last stage keeps of the way from the last layer to the carry."""
        counter = self.counter
        return counter.final_norm_bytes(chunk.pass_) + counter.mixture_bytes(chunk.pass_)

    def _backward_bytes(self, chunk: Chunk) -> int:
        """What a backward needs above everything alive, at its worst moment."""
        if not chunk.has_grad:
            return 0
        # Layers that are kept have had their backward when those before them are recomputed.
        kept = self._units(chunk)[1] if not self._is_recomputed_whole(chunk) else 0
        at_layers = max(self._recomputed_bytes(chunk) - kept, 0)
        at_layers += self._in_flight_bytes(chunk)
        is_loss = self._has_end(chunk) and self.plan.is_last(chunk.pass_)
        if self.num_pipeline_stages == 1:
            at_layers += self._waiting_gradient_bytes(chunk)
        if self._has_end(chunk) and chunk.pass_.mixes_embeddings:
            return max(self._mixture_backward_bytes(chunk), at_layers)
        if not is_loss:
            return at_layers
        return max(self._head_backward_bytes(), at_layers - self.counter.head_bytes())

    def _waiting_gradient_bytes(self, chunk: Chunk) -> int:
        """Weight gradients that wait for those of other passes, before they join the fp32 ones.

        What is recomputed has a backward of its own, and its gradients do not wait.
        """
        size, training = self.counter.shards, self.config.training
        is_waiting = not self.plan.is_last(chunk.pass_) and not self._is_recomputed_whole(chunk)
        num_waiting = sum(self.layers) if is_waiting else 0
        if training.recompute_granularity == "full":
            is_all = training.recompute_method == "uniform"
            num_waiting = 0 if is_all else max(num_waiting - training.recompute_num_layers, 0)
        waiting = num_waiting * _layer_weights(self.config)
        if not self.config.model.untie_embeddings_and_output_weights:
            waiting += size.vocab_rows * size.hidden_size
        return waiting * size.element_bytes

    def _recomputed_bytes(self, chunk: Chunk) -> int:
        """What is computed again and then held at once."""
        if self._is_recomputed_whole(chunk):
            end = self._pass_end_bytes(chunk) if self._has_end(chunk) else 0
            again = sum(self._layer_list(chunk)) + self.counter.rotary_bytes(chunk.pass_) + end
            is_input_held = not self._has_input(chunk)
        else:
            again = max(self._units(chunk)[0], default=0)
            is_input_held = again > 0
        held = self.counter.hidden_bytes(chunk.sent_per_token) if is_input_held else 0
        return again - held

    def _in_flight_bytes(self, chunk: Chunk) -> int:
        """Gradients inside the layers, above what is alive then.

        The model's last layer has those of the slots that are read only; when the one before it has
        its own, what the last one kept is gone.
        """
        anywhere = self._layer_backward_bytes(chunk.pass_.slots_per_token)
        layers = self._layer_list(chunk)
        units, _ = self._units(chunk)
        if not self._has_end(chunk) or units or self._is_recomputed_whole(chunk):
            return anywhere
        at_last = self._layer_backward_bytes(chunk.pass_.outputs_per_token)
        return max(at_last, anywhere - layers[-1]) if len(layers) > 1 else at_last

    def _layer_backward_bytes(self, slots_per_token: int) -> int:
        """Gradients in flight inside the MLP of a layer, where they are largest."""
        size = self.counter.shards
        rows = self.counter.rows(slots_per_token)
        ffn, ffn_input = size.ffn_width, size.ffn_input_width
        is_selective = self.config.training.recompute_granularity == "selective"
        # An activation's output that is made again was not counted as kept.
        kept_ffn, again_ffn, again = (0, ffn, size.hidden_size) if is_selective else (ffn, 0, 0)
        moments = (
            # second projection: input's and weight's gradient
            ffn * (rows + size.hidden_size) + rows * again_ffn,
            # activation: both gradients, silu again, input freed
            rows * (2 * ffn_input - kept_ffn),
            # first projection
            ffn_input * size.hidden_size + rows * (size.hidden_size - kept_ffn + again),
        )
        hidden = self.counter.hidden_bytes(slots_per_token)
        gathered = hidden * size.sequence_shards if size.sequence_shards > 1 else 0
        return hidden + gathered + max(moments) * size.element_bytes

    def _mixture_backward_bytes(self, chunk: Chunk) -> int:
        """Gradients of the logits and of the embeddings, with what was computed again for them."""
        size, read = self.counter.shards, chunk.pass_.outputs_per_token
        gradients = (self.counter.rows(read) + size.hidden_size) * size.vocab_rows
        again = self._recomputed_bytes(chunk) if self._is_recomputed_whole(chunk) else 0
        return gradients * size.element_bytes + again

    def _head_backward_bytes(self) -> int:
        """The output layer's weight gradient, its input's, and in bf16 the logits' in bf16."""
        size, counter = self.counter.shards, self.counter
        logits = counter.rows(1) * size.vocab_rows
        weight = size.vocab_rows * size.hidden_size * size.element_bytes
        products = weight + counter.hidden_bytes(1) * size.sequence_shards
        if self.config.backend.cross_entropy_loss_fusion:
            return self._fused_loss_backward_bytes(products)
        if size.element_bytes == FP32_BYTES:
            return products
        in_bf16 = logits * size.element_bytes
        return max(in_bf16, in_bf16 + products - logits * FP32_BYTES)

    def _fused_loss_backward_bytes(self, products: int) -> int:
        """A chunk's logits, and gradients of weight and input.

        In bf16 with several chunks the weight's gradient is there in fp32 too. Triton's kernel
        works in place; torch in bf16 makes a softmax in fp32 besides.
        """
        size, counter = self.counter.shards, self.counter
        rows = counter.loss_chunk_rows()
        gathered = counter.hidden_bytes(1) * size.sequence_shards if size.sequence_shards > 1 else 0
        chunk = rows * size.vocab_rows * size.element_bytes
        in_fp32 = 0
        if size.element_bytes < FP32_BYTES:
            is_composed = self.config.backend.kernels == "torch"
            in_fp32 += rows * size.vocab_rows * FP32_BYTES * is_composed
            if rows < counter.rows(1):
                in_fp32 += size.vocab_rows * size.hidden_size * FP32_BYTES
        return products + gathered + chunk + in_fp32
