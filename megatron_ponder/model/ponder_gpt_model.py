"""PonderGPTModel: a GPT on megatron-core layers that runs any pass plan.

The model owns the weights and all communication; the method defines the input and the carry of each
pass. One forward is a loop over the plan's passes:

    input of the pass   method.build_input(token embeddings, carry)     on the first pipeline stage
    layers              the same weights in every pass
    final norm          of the output slots only                        on the last pipeline stage
    carry, or logits    method.build_carry, or the output layer         on the last pipeline stage

Under pipeline parallelism a rank runs its part of one pass at a time (`forward_pass`). The schedule
sends the result to the next stage, or from the last stage to the first for the next pass.
"""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_ponder.config.layout import padded_vocab_size
from megatron_ponder.config.resolved import ResolvedModelConfig, ResolvedTrainingConfig
from megatron_ponder.kernels.rotary import rotary_table
from megatron_ponder.model.cache import NewTokens
from megatron_ponder.model.context_parallel import local_shard
from megatron_ponder.model.embedding import (
    PonderEmbedding,
    append_extra_tokens,
    rounded_scale,
)
from megatron_ponder.model.embedding_copy import EmbeddingCopy, mark_as_replicated
from megatron_ponder.model.mixture import mix_embeddings
from megatron_ponder.model.norm import Norm
from megatron_ponder.model.output_layer import OutputLayer
from megatron_ponder.model.padded_vocab import mask_padded_columns
from megatron_ponder.model.rotary_frequencies import build_rotary_embedding
from megatron_ponder.ponder.method import Method
from megatron_ponder.ponder.plan import Pass, PassPlan


class PonderGPTModel(LanguageModule):
    """A decoder-only language model trained by a `Method`.

    Args:
        config: megatron-core's config.
        shape: the model's settings; holds what megatron-core's config does not.
        method: defines the input and the carry of each pass.
        layer_spec: the modules of a layer.
        pg_collection: process groups.
        pre_process: whether this chunk of layers has the embedding.
        post_process: whether this chunk of layers has the final norm and the output layer.
        vp_stage: index of this layer chunk on its rank; None if a rank has only one.
        training_config: says which passes the backward recomputes.
        loss_chunk_tokens: see `linear_cross_entropy`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        shape: ResolvedModelConfig,
        method: Method,
        layer_spec: ModuleSpec,
        pg_collection: ProcessGroupCollection,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        training_config: ResolvedTrainingConfig,
        loss_chunk_tokens: int | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.vp_stage = vp_stage
        self.training_config = training_config
        self.model_type = ModelType.encoder_or_decoder
        self.shape = shape
        self.method = method
        self.pre_process = pre_process
        self.post_process = post_process
        self.share_embeddings_and_output_weights = not shape.untie_embeddings_and_output_weights
        self.embedding_scale = rounded_scale(
            method.embedding_scale(shape.hidden_size), config.params_dtype
        )
        vocab_size = padded_vocab_size(shape)
        has_learned_positions = shape.position_embedding_type == "learned_absolute"
        if pre_process:
            self.embedding = PonderEmbedding(
                config,
                vocab_size=vocab_size,
                num_positions=shape.max_position_embeddings if has_learned_positions else None,
                scale=self.embedding_scale,
                pg_collection=pg_collection,
            )
        self.replicates_embedding = (
            pre_process != post_process
            and method.plan(1).mixes_embeddings
            and not self.share_embeddings_and_output_weights
        )
        if self.replicates_embedding and pre_process:
            mark_as_replicated(self.embedding.word_embeddings.weight, is_copy=False)
        if self.replicates_embedding and post_process:
            self.embedding_copy = EmbeddingCopy(
                config, vocab_size=vocab_size, pg_collection=pg_collection
            )
        self.rotary_pos_emb: RotaryEmbedding | None = None
        if not has_learned_positions:
            self.rotary_pos_emb = build_rotary_embedding(shape, pg_collection)
        # The final norm is not the block's: whether it runs, and on which slots, differs by pass.
        self.decoder = TransformerBlock(
            config=config,
            spec=layer_spec,
            post_layer_norm=False,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        if post_process:
            self.final_norm = Norm(config, config.hidden_size, eps=config.layernorm_epsilon)
            self.output_layer = OutputLayer(
                config.hidden_size,
                vocab_size,
                vocab_size=shape.vocab_size,
                loss_chunk_tokens=loss_chunk_tokens,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process
                and self.share_embeddings_and_output_weights,
                tp_group=pg_collection.tp,
            )
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()
        if post_process and config.gradient_accumulation_fusion and method.plan(1).mixes_embeddings:
            self._use_weights_fused_and_unfused()

    def _use_weights_fused_and_unfused(self) -> None:
        """Keep both parts of a weight's gradient: the fused one and autograd's.

        The output layer adds its part to the fp32 buffer within the matmul. A mixture uses the same
        weight through autograd where it is tied or the loss is fused. Without this mark
        megatron-core drops autograd's part.
        """
        tied = self._tied_weight()
        setattr(self.output_layer.weight if tied is None else tied, "zero_out_wgrad", True)

    def forward(self, tokens: Tensor, labels: Tensor | None, plan: PassPlan) -> Tensor:
        """Run all passes of a plan, on a rank that has all layers.

        Args:
            tokens: int64 [b, s]; under context parallelism all tensors are this rank's shard.
            labels: int64 [b, s], the token after each; None for logits.
            plan: the passes.

        Returns:
            With labels the cross entropy of each token in nats, fp32 [b, s]. Without labels logits
            [b, s, padded vocabulary / tp], minus infinity in padded columns.
        """
        return self.compute_output(self.run_passes(tokens, plan), labels)

    def run_passes(self, tokens: Tensor, plan: PassPlan) -> Tensor:
        """`forward` up to the input of the output layer, [s, b, h]."""
        token_embeddings = self.embed(tokens)
        handed_on: Tensor | None = None
        for pass_ in plan.passes:
            handed_on = self.run_pass(pass_, plan, token_embeddings, handed_on)
        assert handed_on is not None
        return handed_on

    def forward_pass(
        self,
        pass_: Pass,
        plan: PassPlan,
        tokens: Tensor,
        labels: Tensor | None,
        received: Tensor | None,
    ) -> Tensor:
        """Run one pass through the layers of this rank.

        Args:
            pass_: the pass.
            plan: the plan that it belongs to.
            tokens: int64 [b, s].
            labels: int64 [b, s]; None for logits.
            received: on the first stage the carry of the previous pass (None in the first pass); on
                other stages the previous stage's hidden states, [s * slots, b, h].

        Returns:
            Hidden states [s * slots, b, h]. On the last stage the carry [s * output slots, b, h];
            after the last pass what `forward` returns.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and plan.has_grad(pass_)):
            token_embeddings = self.embed(tokens) if self.pre_process else None
            handed_on = self.run_pass(pass_, plan, token_embeddings, received)
            if self.post_process and plan.is_last(pass_):
                return self.compute_output(handed_on, labels)
            return handed_on

    def run_pass(
        self, pass_: Pass, plan: PassPlan, token_embeddings: Tensor | None, received: Tensor | None
    ) -> Tensor:
        """One pass through this rank's layers, with or without gradient, recomputed or not.

        Returns what `forward_pass` returns, except after the last pass: there the input of the
        output layer.

        The carry into the first pass with a gradient is a constant. It still requires a gradient,
        which is never used: megatron-core's recompute computes no weight gradients if no input of
        the layers requires one, and a method's input may be the carry alone.
        """
        if self.pre_process and received is not None and pass_.index == plan.first_grad_pass:
            received = received.detach().requires_grad_()

        def run(token_embeddings: Tensor | None, received: Tensor | None) -> Tensor:
            return self._compute_pass(pass_, plan, token_embeddings, received)

        with torch.set_grad_enabled(torch.is_grad_enabled() and plan.has_grad(pass_)):
            if self.training and plan.is_recomputed(pass_, self.training_config):
                output: Tensor = tensor_parallel.checkpoint(run, False, token_embeddings, received)
                return output
            return run(token_embeddings, received)

    def _compute_pass(
        self, pass_: Pass, plan: PassPlan, token_embeddings: Tensor | None, received: Tensor | None
    ) -> Tensor:
        """The parts of one pass that are on this rank: input, layers, norm, carry."""
        beside: Tensor | None = None
        if self.pre_process:
            assert token_embeddings is not None
            slots = self.method.build_input(pass_, token_embeddings, received)
            hidden = self.add_positions(pass_, slots)
            beside = slots if pass_.carries_input else None
        else:
            assert received is not None
            hidden = received
            if pass_.carries_input:
                hidden, beside = received.chunk(2)
        hidden = self.run_layers(pass_, hidden)
        if not self.post_process:
            return hidden if beside is None else torch.cat((hidden, beside))
        outputs = self.norm_outputs(pass_, hidden)
        return outputs if plan.is_last(pass_) else self.build_carry(pass_, outputs, beside)

    def embed(self, tokens: Tensor) -> Tensor:
        """Scaled embeddings of the tokens, each followed by the method's extra tokens."""
        embeddings: Tensor = self.embedding(
            append_extra_tokens(tokens, self.method.extra_token_ids)
        )
        return embeddings

    def decode_pass(
        self,
        pass_: Pass,
        plan: PassPlan,
        embeddings: Tensor,
        received: Tensor | None,
        at: NewTokens,
    ) -> Tensor:
        """`run_pass` for one new token per row; attention sees the cached slots before it.

        Args:
            pass_: a pass of `plan`.
            plan: of the method's `decoding_plan`.
            embeddings: the new tokens', from `embed`, [1 + extra tokens, b, h].
            received: the carry of the previous pass; None in the first pass.
            at: positions of the new tokens.
        """
        slots = self.method.build_decoding_input(pass_, embeddings, received)
        hidden = slots
        if pass_.add_positions:
            hidden = self.embedding.add_positions(slots, pass_.slots_per_token, at.positions)
        outputs = self.norm_outputs(pass_, self.run_layers(pass_, hidden, at.rotary))
        if plan.is_last(pass_):
            return outputs
        return self.build_carry(pass_, outputs, slots if pass_.carries_input else None)

    def add_positions(self, pass_: Pass, slots: Tensor) -> Tensor:
        """The input of the first layer, [s * slots, b, h] (local under sequence parallelism)."""
        if not pass_.add_positions:
            return slots
        return self.embedding.add_positions(slots, pass_.slots_per_token)

    def build_carry(self, pass_: Pass, outputs: Tensor, pass_input: Tensor | None) -> Tensor:
        """The carry to the next pass, [s * output slots, b, h]."""
        return self.method.build_carry(pass_, outputs, self.mix, pass_input)

    def mix(self, outputs: Tensor) -> Tensor:
        """softmax(output layer) @ (scaled embedding table): [slots, b, h] -> [slots, b, h]."""
        settings = self.method.config
        mixture = mix_embeddings(
            self.compute_logits(outputs),
            self.mixed_embeddings(),
            self.pg_collection.tp,
            sequence_parallel=self.config.sequence_parallel,
            top_k=settings.interpolation_topk if settings.interpolation_use_topk else None,
        )
        return mixture if self.embedding_scale is None else mixture * self.embedding_scale

    def mixed_embeddings(self) -> Tensor:
        """The embedding table, on the last stage: [padded vocabulary / tp, h]."""
        if self.replicates_embedding and self.post_process:
            copy: Tensor = self.embedding_copy()
            return copy
        table: Tensor = self.shared_embedding_or_output_weight()
        return table

    def all_reduce_replicated_embedding(self) -> None:
        """Sum the gradient of an embedding that is on two stages; nothing to do on one.

        megatron-core does this for tied embeddings. Call it after the reduction over data-parallel
        ranks: with the distributed optimizer each rank then has the same part of both copies, and
        the other parts are unused.
        """
        weight = self.replicated_embedding
        if weight is not None:
            gradient: Tensor = weight.main_grad  # type: ignore[attr-defined]
            dist.all_reduce(gradient, group=self.embd_group)

    @property
    def replicated_embedding(self) -> torch.nn.Parameter | None:
        """This rank's copy of an untied embedding that is on the first and on the last stage."""
        if not self.replicates_embedding:
            return None
        holder = self.embedding.word_embeddings if self.pre_process else self.embedding_copy
        weight: torch.nn.Parameter = holder.weight
        return weight

    def run_layers(self, pass_: Pass, hidden: Tensor, rotary: Tensor | None = None) -> Tensor:
        """Run this rank's layers; all slots of a token have the token's position.

        Args:
            pass_: the pass.
            hidden: [s * slots, b, h] (local under sequence and context parallelism).
            rotary: table for queries and keys; None: computed for a text from position 0.

        Returns:
            [s * slots, b, h]; on the last stage [s * output slots, b, h].
        """
        if rotary is None and self.rotary_pos_emb is not None:
            num_tokens = self._num_tokens(hidden.size(0) // pass_.slots_per_token)
            rotary = self.rotary_of(num_tokens, pass_.slots_per_token, hidden.dtype)
        if not self.pre_process:  # the block takes its input from here, not from its argument
            self.decoder.set_input_tensor(hidden)
        outputs: Tensor = self.decoder(
            hidden, attention_mask=None, rotary_pos_emb=rotary, packed_seq_params=pass_
        )
        return outputs

    def rotary_of(self, num_tokens: int, slots_per_token: int, dtype: torch.dtype) -> Tensor:
        """The table of `kernels.rotary` for a text from position 0 (this rank's shard)."""
        assert self.rotary_pos_emb is not None
        angles = self.rotary_pos_emb.get_emb(num_tokens)
        angles = local_shard(angles, dim=0, group=self.pg_collection.cp)
        return rotary_table(angles, slots_per_token, dtype)

    def _num_tokens(self, num_tokens_local: int) -> int:
        """Tokens of the whole sequence, from the number whose slots are on this rank."""
        tp_size = self.pg_collection.tp.size() if self.config.sequence_parallel else 1
        return int(num_tokens_local * tp_size * self.pg_collection.cp.size())

    def norm_outputs(self, pass_: Pass, hidden: Tensor) -> Tensor:
        """Apply the final norm if the pass has one: [s * output slots, b, h]."""
        return self.final_norm(hidden) if pass_.final_norm else hidden

    def compute_output(self, outputs: Tensor, labels: Tensor | None) -> Tensor:
        """Logits, or the loss of each token, as `forward` returns them. `outputs` is [s, b, h]."""
        if labels is not None and self.config.cross_entropy_loss_fusion:
            # [b, s] -> [s, b], and back
            fused: Tensor = self.output_layer(outputs, self._tied_weight(), labels=labels.t())
            return fused.t().contiguous()
        logits = self.compute_logits(outputs)
        if labels is None:
            return logits.transpose(0, 1)
        losses: Tensor = self.compute_language_model_loss(labels, logits)
        return losses

    def _tied_weight(self) -> Tensor | None:
        """The embedding's weight if the output layer shares it; None if that has its own."""
        if self.share_embeddings_and_output_weights:
            weight: Tensor = self.shared_embedding_or_output_weight()
            return weight
        return None

    def compute_logits(self, outputs: Tensor) -> Tensor:
        """The output layer: [slots, b, h] (local) -> [slots, b, padded vocabulary / tp]."""
        logits, _ = self.output_layer(outputs, self._tied_weight())
        return mask_padded_columns(logits, self.shape.vocab_size, self.pg_collection.tp)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """As megatron-core's GPTModel: the final norm is stored under the decoder's name.

        Leaves out the extra state of TransformerEngine's attention. Other attention does not save
        one, and it is empty without delayed scaling.
        """
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for key in [key for key in state if key.endswith("core_attention._extra_state")]:
            del state[key]
        apply_prefix_mapping(state, {f"{prefix}final_norm.": f"{prefix}decoder.final_layernorm."})
        return state
