"""Sizes of one rank's part of the model and of a micro-batch: what every estimate is made of."""

import dataclasses

from megatron_ponder.config.layout import padded_vocab_size
from megatron_ponder.config.resolved import ResolvedConfig

FP32_BYTES = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shards:
    """One rank's widths and lengths. Everything is what this rank holds, not the whole."""

    micro_batch_size: int
    """Sequences."""
    tokens: int
    """Tokens of each sequence (the context-parallel shard)."""
    hidden_size: int
    """Width of the residual stream, which is never cut."""
    attention_width: int
    """Queries: this rank's heads times head width."""
    key_value_width: int
    """Keys, and again as much for values."""
    num_heads: int
    """Query heads."""
    ffn_width: int
    """Inside the MLP, behind the activation."""
    ffn_input_width: int
    """Before the activation: gate and up projection, where there are both."""
    vocab_rows: int
    """Rows of the padded vocabulary."""
    rotated_channels: int
    """Channels of a head that are rotated; 0 with learned positions."""
    sequence_shards: int
    """Tensor-parallel ranks that share the residual stream along the sequence; 1 without SP."""
    context_parallel_size: int
    """Ranks that share each sequence."""
    element_bytes: int
    """Of weights and activations."""


def shards_of(config: ResolvedConfig) -> Shards:
    """This run's sizes on a rank.

    Args:
        config: resolved.
    """
    model, parallel = config.model, config.parallel
    tensor_parallel = parallel.tensor_model_parallel_size
    ffn = model.ffn_hidden_size // tensor_parallel
    is_rotary = model.position_embedding_type == "rope"
    return Shards(
        micro_batch_size=config.training.micro_batch_size,
        tokens=config.data.seq_length // parallel.context_parallel_size,
        hidden_size=model.hidden_size,
        attention_width=model.num_attention_heads * model.kv_channels // tensor_parallel,
        key_value_width=model.num_query_groups * model.kv_channels // tensor_parallel,
        num_heads=model.num_attention_heads // tensor_parallel,
        ffn_width=ffn,
        ffn_input_width=2 * ffn if model.activation == "swiglu" else ffn,
        vocab_rows=padded_vocab_size(model) // tensor_parallel,
        rotated_channels=int(model.rotary_percent * model.kv_channels) if is_rotary else 0,
        sequence_shards=tensor_parallel if parallel.sequence_parallel else 1,
        context_parallel_size=parallel.context_parallel_size,
        element_bytes=2 if config.training.bf16 else FP32_BYTES,
    )


def layers_by_stage(config: ResolvedConfig) -> list[list[int]]:
    """Layers of each pipeline stage, by layer chunk.

    Args:
        config: resolved.
    """
    parallel = config.parallel
    num_pipeline_stages = parallel.pipeline_model_parallel_size
    num_chunks = parallel.num_virtual_stages_per_pipeline_rank
    given = {
        0: parallel.decoder_first_pipeline_num_layers,
        num_pipeline_stages - 1: parallel.decoder_last_pipeline_num_layers,
    }
    stated = {stage: layers for stage, layers in given.items() if layers is not None}
    num_others = num_pipeline_stages - len(stated)
    equal_share = (config.model.num_layers - sum(stated.values())) // max(num_others, 1)
    return [
        [stated.get(stage, equal_share) // num_chunks] * num_chunks
        for stage in range(num_pipeline_stages)
    ]
