"""PonderGPTModel: a GPT on megatron-core layers that runs any pass plan.

The model owns weights and communication; the method says what each pass reads and hands on. One
forward is a loop over the plan's passes:

    input of the pass   <- method.build_input(token embeddings, carry)     where the embedding is
    layers              <- the same weights in every pass
    final norm          <- only on the slots that somebody reads
    carry, or logits    <- method.build_carry / output layer               where the last layer is

The three steps are methods of their own, because pipeline parallelism runs them on different ranks.
"""

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

from megatron_ponder.config.resolve import padded_vocab_size
from megatron_ponder.config.schema import ModelConfig
from megatron_ponder.kernels.rotary import rotary_table
from megatron_ponder.model.embedding import PonderEmbedding
from megatron_ponder.model.norm import Norm
from megatron_ponder.model.padded_vocab import mask_padded_columns
from megatron_ponder.model.stages import kept_stages
from megatron_ponder.ponder.method import Method
from megatron_ponder.ponder.plan import Pass, PassPlan


class PonderGPTModel(LanguageModule):
    """A decoder-only language model trained by a `Method`.

    Args:
        config: megatron-core's config.
        shape: resolved, for what megatron-core's config does not hold.
        method: what each pass reads and hands on.
        layer_spec: the modules of a layer.
        pg_collection: process groups.
        pre_process: whether this stage holds the embedding.
        post_process: whether this stage holds the final norm and the output layer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        shape: ModelConfig,
        method: Method,
        layer_spec: ModuleSpec,
        pg_collection: ProcessGroupCollection,
        pre_process: bool = True,
        post_process: bool = True,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.model_type = ModelType.encoder_or_decoder
        self.shape = shape
        self.method = method
        self.pre_process = pre_process
        self.post_process = post_process
        self.share_embeddings_and_output_weights = not shape.untie_embeddings_and_output_weights
        vocab_size = padded_vocab_size(shape)
        has_learned_positions = shape.position_embedding_type == "learned_absolute"
        if pre_process:
            self.embedding = PonderEmbedding(
                config,
                vocab_size=vocab_size,
                num_positions=shape.max_position_embeddings if has_learned_positions else None,
                scale=method.embedding_scale(shape.hidden_size),
                pg_collection=pg_collection,
            )
        self.rotary_pos_emb: RotaryEmbedding | None = None
        if not has_learned_positions:
            self.rotary_pos_emb = RotaryEmbedding(
                kv_channels=config.kv_channels,
                rotary_percent=shape.rotary_percent,
                rotary_base=shape.rotary_base,
                cp_group=pg_collection.cp,
            )
        # The final norm is the model's: whether it runs, and on which slots, differs by pass.
        self.decoder = TransformerBlock(
            config=config,
            spec=layer_spec,
            post_layer_norm=False,
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=pg_collection,
        )
        if post_process:
            self.final_norm = Norm(config, config.hidden_size, eps=config.layernorm_epsilon)
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,
                skip_weight_param_allocation=pre_process
                and self.share_embeddings_and_output_weights,
                tp_group=pg_collection.tp,
            )
            self.setup_embeddings_and_output_layer()

    def forward(self, tokens: Tensor, labels: Tensor | None, plan: PassPlan) -> Tensor:
        """Run all passes of `plan`.

        Args:
            tokens: int64 [b, s].
            labels: int64 [b, s], the token after each; None for logits.
            plan: the passes.

        Returns:
            With labels the cross entropy of each token, fp32 [b, s]; without them logits
            [b, s, padded vocabulary / tp], minus infinity in padded columns.
        """
        token_embeddings = self.embedding(tokens)
        carry: Tensor | None = None
        for pass_ in plan.passes:
            hidden = self.build_input(pass_, token_embeddings, carry)
            hidden = self.run_layers(pass_, hidden, num_tokens=tokens.size(1))
            read = self.read(pass_, hidden)
            if not plan.is_last(pass_):
                carry = self.method.build_carry(pass_, read)
        return self.compute_output(read, labels)

    def build_input(self, pass_: Pass, token_embeddings: Tensor, carry: Tensor | None) -> Tensor:
        """The input of the first layer, [s * stages, b, h] (local under sequence parallelism)."""
        slots = self.method.build_input(pass_, token_embeddings, carry)
        return (
            self.embedding.add_positions(slots, pass_.num_stages) if pass_.add_positions else slots
        )

    def run_layers(self, pass_: Pass, hidden: Tensor, num_tokens: int) -> Tensor:
        """All layers of this rank; every slot of a token has the token's position.

        Args:
            pass_: the pass.
            hidden: [s * stages, b, h] (local under sequence parallelism).
            num_tokens: s over all sequence-parallel ranks.

        Returns:
            [s * read stages, b, h]: the last layer gives the slots that are read only.
        """
        rotary = None
        if self.rotary_pos_emb is not None:
            angles = self.rotary_pos_emb(num_tokens)
            rotary = rotary_table(angles, pass_.num_stages, hidden.dtype)
        return self.decoder(hidden, attention_mask=kept_stages(pass_), rotary_pos_emb=rotary)

    def read(self, pass_: Pass, hidden: Tensor) -> Tensor:
        """What the layers gave, normed if the pass says so: [s * read stages, b, h]."""
        return self.final_norm(hidden) if pass_.final_norm else hidden

    def compute_output(self, read: Tensor, labels: Tensor | None) -> Tensor:
        """Logits, or the loss of each token; see `forward`. `read` is [s, b, h]."""
        weight = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else None
        )
        logits, _ = self.output_layer(read, weight=weight)
        assert self.shape.vocab_size is not None
        logits = mask_padded_columns(logits, self.shape.vocab_size, self.pg_collection.tp)
        if labels is None:
            return logits.transpose(0, 1)
        return self.compute_language_model_loss(labels, logits)

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """What megatron-core's schedule received from the previous stage; None on the first."""
        received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.decoder.set_input_tensor(received)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict | None = None,
    ) -> ShardedStateDict:
        """As megatron-core's GPTModel: the final norm is stored as the decoder's."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        apply_prefix_mapping(state, {f"{prefix}final_norm.": f"{prefix}decoder.final_layernorm."})
        return state
