"""Bytes on each pipeline stage's ranks: weights, gradients, optimizer state, and a step's peak.

What stays between steps: weights in the run's dtype, gradients in fp32, Adam's two moments in fp32
and, in bf16, fp32 master weights; the distributed optimizer divides the optimizer's part over
data-parallel ranks.

What a step adds: activations from a micro-batch's forward to its backward, in the order in which
megatron-core runs them (order.py), and what a backward needs for a moment: gradients in flight, and
layers that are recomputed. With one stage all passes are one graph, in which torch holds each
weight's gradient from the last pass's backward until the first pass's.

Left out: the allocator's rounding and fragmentation, buffers of communication libraries, the
framework itself (a CUDA context and libraries: about 1 GiB), data loading, evaluation and saving.
"""

import dataclasses
from collections import deque

from megatron_ponder.model.size import layer_parameters, norm_parameters
from megatron_ponder.planning.activations import StageActivations
from megatron_ponder.planning.run import FP32_BYTES, PlannedRun, Stage
from megatron_ponder.ponder.chunks import Chunk, max_sends_kept

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


def stage_memory(run: PlannedRun, num_microbatches: int | None = None) -> list[StageMemory]:
    """Memory by pipeline stage.

    Args:
        run: the run.
        num_microbatches: of a step on each data-parallel rank; None: those of the run.
    """
    parallel, is_bf16 = run.config.parallel, run.config.training.bf16
    state_bytes = FP32_BYTES * (ADAM_MOMENTS + is_bf16)
    num_sharing = 1
    if parallel.use_distributed_optimizer:
        num_sharing = run.replicas * parallel.context_parallel_size
    result = []
    for stage in run.stages:
        count = local_parameters(stage)
        activations, num_alive = _StagePeak(run, stage.index).find(num_microbatches)
        result.append(
            StageMemory(
                num_parameters=count,
                parameters=count * run.sizes.element_bytes,
                gradients=count * FP32_BYTES,
                optimizer=count * state_bytes // num_sharing,
                activations=activations,
                num_alive=num_alive,
            )
        )
    return result


def local_parameters(stage: Stage) -> int:
    """Weights on one rank of a pipeline stage, rows that pad the vocabulary included."""
    run, size, model = stage.run, stage.size, stage.run.config.model
    tensor_parallel = run.config.parallel.tensor_model_parallel_size
    count = stage.num_layers * layer_parameters(model, tensor_parallel)
    table = size.vocab_rows * size.hidden_size
    if stage.is_first:
        count += table
        if model.position_embedding_type == "learned_absolute":
            count += model.max_position_embeddings * size.hidden_size
    if stage.is_last:
        # Tied embeddings are one table where both ends are on one rank, and a copy where not.
        is_untied = model.untie_embeddings_and_output_weights
        count += norm_parameters(model, size.hidden_size)
        count += table if is_untied or run.num_stages > 1 else 0
        count += table if has_embedding_copy(run) else 0
    return count


def has_embedding_copy(run: PlannedRun) -> bool:
    """Whether the last stage has the embedding besides an output layer, to mix embeddings."""
    is_untied = run.config.model.untie_embeddings_and_output_weights
    return run.num_stages > 1 and is_untied and run.method.plan(1).mixes_embeddings


class _StagePeak(StageActivations):
    """Finds the peak of a step on one stage."""

    def find(self, num_microbatches: int | None) -> tuple[int, int]:
        """Bytes, and how many chunks of micro-batches are alive then."""
        chunks = self.run.chunks
        kept = [self._kept_bytes(chunk) for chunk in chunks]
        backward = [self._backward_bytes(chunk) for chunk in chunks]
        max_sends = max_sends_kept(self.run.num_stages, len(chunks))
        sending = {False: deque[int](maxlen=max_sends), True: deque[int](maxlen=max_sends)}
        held = num_alive = peak = num_alive_then = 0
        for is_backward, chunk, _ in self.run.pipeline(num_microbatches).order(self.index):
            if not is_backward:
                held, num_alive = held + kept[chunk], num_alive + 1
            if message := self.message_bytes(chunks[chunk], is_backward=is_backward):
                sending[is_backward].append(message)
            now = held + sum(map(sum, sending.values()))
            now += backward[chunk] if is_backward else 0
            if now > peak:
                peak, num_alive_then = now, num_alive
            if is_backward:
                held, num_alive = held - kept[chunk], num_alive - 1
        return peak, num_alive_then

    def _kept_bytes(self, chunk: Chunk) -> int:
        """From a forward to its backward."""
        kept = self._received_bytes(chunk)
        if not chunk.has_grad:
            return kept
        if self.recomputes_pass(chunk):
            return kept + self._pass_input_bytes(chunk)
        units, others = self._by_unit(chunk)
        kept += others + len(units) * self.hidden_bytes(chunk.pass_.slots_per_token)
        kept += self.rotary_bytes(chunk.pass_)
        return kept + self.pass_end_bytes(chunk) + self.head_bytes(chunk)

    def _received_bytes(self, chunk: Chunk) -> int:
        """The input of a chunk that the schedule holds until its backward.

        Where it is the input of the first layer, that layer keeps it anyway.
        """
        if self.run.num_stages == 1 or (self.is_first and chunk.index == 0):
            return 0
        if self.builds_input(chunk):
            return self._carry_bytes(chunk)
        return 0 if chunk.has_grad else self.hidden_bytes(chunk.sent_per_token)

    def _carry_bytes(self, chunk: Chunk) -> int:
        """What the chunk before hands on to this one."""
        return self.hidden_bytes(self.run.chunks[chunk.index - 1].handed_on_per_token)

    def _pass_input_bytes(self, chunk: Chunk) -> int:
        """What a pass is recomputed from."""
        if not self.builds_input(chunk):
            return self.hidden_bytes(chunk.sent_per_token)
        # In one graph all passes share the embeddings.
        is_one_graph = self.run.num_stages == 1
        kept = 0 if is_one_graph and chunk.index > 0 else self.hidden_bytes(1)
        return kept + (self._carry_bytes(chunk) if is_one_graph and chunk.index > 0 else 0)

    def _by_unit(self, chunk: Chunk) -> tuple[list[int], int]:
        """Bytes of each unit of layers that is recomputed, and of all layers that are not."""
        layers = self.layers_bytes(chunk)
        units = [sum(layers[layer] for layer in unit) for unit in self.recomputed_units(chunk)]
        return units, sum(layers) - sum(units)

    def _backward_bytes(self, chunk: Chunk) -> int:
        """What a backward needs above everything alive, at its peak."""
        if not chunk.has_grad:
            return 0
        # Layers that are kept have had their backward when those before them are recomputed.
        kept = 0 if self.recomputes_pass(chunk) else self._by_unit(chunk)[1]
        at_layers = max(self._recomputed_bytes(chunk) - kept, 0)
        at_layers += self._in_flight_bytes(chunk)
        if self.run.num_stages == 1:
            at_layers += self._waiting_gradient_bytes(chunk)
        if self.ends_pass(chunk) and chunk.pass_.mixes_embeddings:
            return max(self._mixture_backward_bytes(chunk), at_layers)
        if not self.has_loss(chunk):
            return at_layers
        return max(self._head_backward_bytes(), at_layers - self.head_bytes(chunk))

    def _waiting_gradient_bytes(self, chunk: Chunk) -> int:
        """Weight gradients that wait for those of other passes, before they join the fp32 ones.

        What is recomputed has a backward of its own, and its gradients do not wait.
        """
        size, model = self.size, self.run.config.model
        num_waiting = 0
        if not self.has_loss(chunk) and not self.recomputes_pass(chunk):
            num_waiting = self.num_layers - sum(map(len, self.recomputed_units(chunk)))
        waiting = num_waiting * layer_parameters(
            model, self.run.config.parallel.tensor_model_parallel_size
        )
        if not model.untie_embeddings_and_output_weights:
            waiting += size.vocab_rows * size.hidden_size
        return waiting * size.element_bytes

    def _recomputed_bytes(self, chunk: Chunk) -> int:
        """What is recomputed and then held at once, beyond the input that was kept."""
        if self.recomputes_pass(chunk):
            recomputed = sum(self.layers_bytes(chunk)) + self.rotary_bytes(chunk.pass_)
            recomputed += self.pass_end_bytes(chunk)
            is_input_held = not self.builds_input(chunk)
        else:
            recomputed = max(self._by_unit(chunk)[0], default=0)
            is_input_held = recomputed > 0
        return recomputed - (self.hidden_bytes(chunk.sent_per_token) if is_input_held else 0)

    def _in_flight_bytes(self, chunk: Chunk) -> int:
        """Gradients inside the layers, above what is alive then.

        The model's last layer has those of the output slots only; when the layer before has its
        own, what the last one kept is freed.
        """
        inside = self._layer_backward_bytes(chunk.pass_.slots_per_token)
        if not self.ends_pass(chunk) or self.recomputed_units(chunk) or self.recomputes_pass(chunk):
            return inside
        layers = self.layers_bytes(chunk)
        at_last = self._layer_backward_bytes(chunk.pass_.outputs_per_token)
        return max(at_last, inside - layers[-1]) if len(layers) > 1 else at_last

    def _layer_backward_bytes(self, slots_per_token: int) -> int:
        """Gradients in flight inside the MLP of a layer, where they are largest."""
        size, rows = self.size, self.rows(slots_per_token)
        hidden, ffn, ffn_input = size.hidden_size, size.ffn_width, size.ffn_input_width
        # An activation's output that is recomputed was not counted as kept.
        kept_ffn, recomputed_ffn, recomputed = (
            (0, ffn, hidden) if self.is_selective else (ffn, 0, 0)
        )
        moments = (
            # second projection: input's and weight's gradient
            ffn * (rows + hidden) + rows * recomputed_ffn,
            # activation: both gradients, silu recomputed, input freed
            rows * (2 * ffn_input - kept_ffn),
            # first projection
            ffn_input * hidden + rows * (hidden - kept_ffn + recomputed),
        )
        gradient = self.hidden_bytes(slots_per_token)
        return gradient + self._gathered_bytes(gradient) + max(moments) * size.element_bytes

    def _gathered_bytes(self, shard_bytes: int) -> int:
        """A tensor gathered from the sequence shards; 0 without sequence parallelism."""
        shards = self.size.sequence_shards
        return shard_bytes * shards if shards > 1 else 0

    def _mixture_backward_bytes(self, chunk: Chunk) -> int:
        """Gradients of the logits and of the embeddings, with what was recomputed for them."""
        size = self.size
        gradients = self.rows(chunk.pass_.outputs_per_token) + size.hidden_size
        recomputed = self._recomputed_bytes(chunk) if self.recomputes_pass(chunk) else 0
        return gradients * size.vocab_rows * size.element_bytes + recomputed

    def _head_backward_bytes(self) -> int:
        """The output layer's weight gradient, its input's, and in bf16 the logits' in bf16."""
        size = self.size
        logits = self.rows(1) * size.vocab_rows
        weight = size.vocab_rows * size.hidden_size * size.element_bytes
        matmuls = weight + self.hidden_bytes(1) * size.sequence_shards
        if self.run.config.backend.cross_entropy_loss_fusion:
            return matmuls + self._fused_loss_backward_bytes()
        if size.element_bytes == FP32_BYTES:
            return matmuls
        in_bf16 = logits * size.element_bytes
        return max(in_bf16, in_bf16 + matmuls - logits * FP32_BYTES)

    def _fused_loss_backward_bytes(self) -> int:
        """A chunk's logits, and what is computed from them beside the gradients.

        In bf16 with several chunks the weight's gradient is there in fp32 too. Triton's kernel
        works in place; torch in bf16 has a softmax in fp32 besides.
        """
        size, rows = self.size, self.loss_chunk_rows()
        needed = self._gathered_bytes(self.hidden_bytes(1))
        needed += rows * size.vocab_rows * size.element_bytes
        if size.element_bytes < FP32_BYTES:
            is_composed = self.run.config.backend.kernels == "torch"
            needed += rows * size.vocab_rows * FP32_BYTES * is_composed
            if rows < self.rows(1):
                needed += size.vocab_rows * size.hidden_size * FP32_BYTES
        return needed
