"""A run on ranks that need not exist, and one of its pipeline stages: the basis of all estimates.

Sizes are those of one rank. What is counted from them is in the modules beside this one.
"""

import dataclasses
import functools

from megatron_ponder.config.layout import (
    data_parallel_size,
    layers_of_pipeline_ranks,
    microbatches_per_step,
    padded_vocab_size,
)
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.data.tokenizers import build_tokenizer
from megatron_ponder.model.size import linear_modules
from megatron_ponder.planning.order import Pipeline
from megatron_ponder.ponder.chunks import Chunk, activation_sent, cut_into_chunks, gradient_sent
from megatron_ponder.ponder.method import Method, load_method
from megatron_ponder.ponder.plan import Pass, PassPlan
from megatron_ponder.ponder.training_plan import (
    check_hook_counts,
    possible_jacobi_iterations,
    training_plan,
)

FP32_BYTES = 4
GIB = 1 << 30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Widths and lengths on one rank."""

    tokens: int
    """Tokens of a micro-batch, over all its sequences (context-parallel shards)."""
    hidden_size: int
    """Width of the residual stream, which is never sharded."""
    attention_width: int
    """Queries: heads times head width."""
    key_value_width: int
    """Keys; values have the same width."""
    num_heads: int
    """Query heads."""
    ffn_width: int
    """Inside the MLP, behind the activation."""
    ffn_input_width: int
    """Before the activation: gate and up projection, where there are both."""
    vocab_rows: int
    """Rows of the padded vocabulary."""
    rotated_channels: int
    """Rotated channels of a head; 0 with learned positions."""
    sequence_shards: int
    """Tensor-parallel ranks that share the residual stream along the sequence; 1 without SP."""
    element_bytes: int
    """Of a weight or an activation."""


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A resolved run on a number of ranks.

    What depends on R is for the largest R that training may draw.
    """

    config: ResolvedConfig
    """Resolved for `world_size` ranks."""
    world_size: int

    @classmethod
    def resolved(cls, config: RunConfig, world_size: int) -> "PlannedRun":
        """A run whose settings are checked as training checks them.

        The tokenizer is built only if nothing else gives the size of the vocabulary.

        Raises:
            ConfigError: training would refuse the settings.
            DataError: the tokenizer is needed and missing.
        """
        if config.checkpoint.save is None:  # recipes leave --save to the command line
            config = config.replaced(save_interval=None)
        vocab_size = None
        if config.model.vocab_size is None and config.data.tokenizer_model is not None:
            vocab_size = build_tokenizer(config.data).vocab_size
        resolved = resolve(config, world_size=world_size, tokenizer_vocab_size=vocab_size)
        run = cls(resolved, world_size)
        if config.parallel.overlap_grad_reduce:
            check_hook_counts(run.config, run.method)
        return run

    def changed(self, **settings: object) -> "PlannedRun":
        """The same with other settings, checked.

        Raises:
            ConfigError: training would refuse them.
        """
        return PlannedRun.resolved(self.config.replaced(**settings), self.world_size)

    @functools.cached_property
    def method(self) -> Method:
        """The run's method.

        Raises:
            ConfigError: the method is unknown.
        """
        return load_method(self.config.method)

    @property
    def largest_r(self) -> int:
        """The largest R that training may draw."""
        return possible_jacobi_iterations(self.config.method)[-1]

    @functools.cached_property
    def plan(self) -> PassPlan:
        """The passes of a training forward."""
        return training_plan(self.method, self.largest_r)

    @functools.cached_property
    def chunks(self) -> tuple[Chunk, ...]:
        """What the pipeline schedule runs."""
        return cut_into_chunks(self.plan, self.config.parallel.num_virtual_stages_per_pipeline_rank)

    @property
    def num_stages(self) -> int:
        """Pipeline stages."""
        return self.config.parallel.pipeline_model_parallel_size

    @functools.cached_property
    def stages(self) -> list["Stage"]:
        """All pipeline stages."""
        return [Stage(self, index) for index in range(self.num_stages)]

    @property
    def replicas(self) -> int:
        """Data-parallel ranks."""
        return data_parallel_size(self.config, self.world_size)

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of a step on each data-parallel rank."""
        return microbatches_per_step(self.config, self.world_size)

    def pipeline(self, num_microbatches: int | None = None) -> Pipeline:
        """The order of a step.

        Args:
            num_microbatches: of each data-parallel rank; None: those of the run.
        """
        return Pipeline(
            num_pipeline_stages=self.num_stages,
            num_chunks=len(self.chunks),
            num_microbatches=num_microbatches or self.num_microbatches,
            first_grad_chunk=next(chunk.index for chunk in self.chunks if chunk.has_grad),
            overlap=self.config.parallel.overlap_p2p_communication,
        )

    @functools.cached_property
    def sizes(self) -> Sizes:
        """Sizes on a rank, the same on every stage."""
        model, parallel, training = self.config.model, self.config.parallel, self.config.training
        tensor_parallel = parallel.tensor_model_parallel_size
        (hidden, qkv_width), (attention_width, _), (_, ffn_input_width), (ffn_width, _) = (
            linear_modules(model, tensor_parallel)
        )
        is_rotary = model.position_embedding_type == "rope"
        return Sizes(
            tokens=training.micro_batch_size
            * (self.config.data.seq_length // parallel.context_parallel_size),
            hidden_size=hidden,
            attention_width=attention_width,
            key_value_width=(qkv_width - attention_width) // 2,
            num_heads=model.num_attention_heads // tensor_parallel,
            ffn_width=ffn_width,
            ffn_input_width=ffn_input_width,
            vocab_rows=padded_vocab_size(model) // tensor_parallel,
            rotated_channels=int(model.rotary_percent * model.kv_channels) if is_rotary else 0,
            sequence_shards=tensor_parallel if parallel.sequence_parallel else 1,
            element_bytes=2 if training.bf16 else FP32_BYTES,
        )


@dataclasses.dataclass(frozen=True)
class Stage:
    """One rank of a pipeline stage. Estimates of its memory and traffic are subclasses."""

    run: PlannedRun
    index: int
    """From 0."""

    @property
    def is_first(self) -> bool:
        """Whether it embeds tokens."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it has the output layer."""
        return self.index == self.run.num_stages - 1

    @property
    def size(self) -> Sizes:
        """Sizes on this rank."""
        return self.run.sizes

    @functools.cached_property
    def num_layers(self) -> int:
        """Layers on this rank."""
        return layers_of_pipeline_ranks(self.run.config)[self.index]

    @property
    def layers_per_chunk(self) -> int:
        """Layers that a chunk runs through here."""
        return self.num_layers // self.run.config.parallel.num_virtual_stages_per_pipeline_rank

    def builds_input(self, chunk: Chunk) -> bool:
        """Whether the pass's input is built here, before the chunk."""
        return self.is_first and chunk.layer_chunk == 0

    def ends_pass(self, chunk: Chunk) -> bool:
        """Whether the final norm and the carry or the loss follow the chunk here."""
        return self.is_last and chunk.is_last_of_pass

    def has_loss(self, chunk: Chunk) -> bool:
        """Whether the loss follows the chunk here."""
        return self.is_last and chunk.index == len(self.run.chunks) - 1

    def recomputes_pass(self, chunk: Chunk) -> bool:
        """Whether the backward recomputes the chunk from the input of its pass."""
        return self.run.plan.is_recomputed(chunk.pass_, self.run.config.training)

    def recomputed_units(self, chunk: Chunk) -> list[range]:
        """Layers of the chunk that the backward recomputes, one range for each unit of layers.

        Those of --recompute-granularity full; a pass that is recomputed whole has no units.
        """
        training, num_layers = self.run.config.training, self.layers_per_chunk
        if training.recompute_granularity != "full" or not chunk.has_grad:
            return []
        unit = training.recompute_num_layers
        if training.recompute_method == "block":
            return [range(layer, layer + 1) for layer in range(min(unit, num_layers))]
        return [range(first, first + unit) for first in range(0, num_layers, unit)]

    def rows(self, slots_per_token: int) -> int:
        """Slots of a micro-batch with `slots_per_token`."""
        return slots_per_token * self.size.tokens

    def hidden_bytes(self, slots_per_token: int) -> int:
        """One tensor of the residual stream."""
        rows = self.rows(slots_per_token) // self.size.sequence_shards
        return rows * self.size.hidden_size * self.size.element_bytes

    def gathered_key_value_bytes(self, pass_: Pass) -> int:
        """Keys and values of a layer that come from the other context-parallel ranks."""
        others = self.run.config.parallel.context_parallel_size - 1
        rows = others * self.rows(pass_.slots_per_token)
        return rows * 2 * self.size.key_value_width * self.size.element_bytes

    def message_bytes(self, chunk: Chunk, *, is_backward: bool) -> int:
        """What another stage is sent after the forward or backward of a micro-batch."""
        if self.run.num_stages == 1:
            return 0
        if is_backward:
            sent = gradient_sent(self.run.chunks, chunk, is_first_stage=self.is_first)
        else:
            sent = activation_sent(self.run.chunks, chunk, is_last_stage=self.is_last)
        return self.hidden_bytes(sent)
