"""Rotary frequencies of a model, and their scaling to longer sequences.

linear: position t counts as t / `rotary_seq_len_interpolation_factor`.
Llama 3.1 (`use_rope_scaling`), for a frequency f of wave length w = 2 pi / f, an original context
of c tokens, factors l < h and a scale s:

    w < c / h   f
    w > c / l   f / s
    between     (1 - m) f / s + m f,   m = (c / w - l) / (h - l)

megatron-core has both, but with constants for l, h and c. Left out: scalings that depend on the
length of each sequence (dynamic, longrope) or change the attention's temperature (yarn).
"""

import math

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_ponder.config.resolved import ResolvedModelConfig


def build_rotary_embedding(
    shape: ResolvedModelConfig, pg_collection: ProcessGroupCollection
) -> RotaryEmbedding:
    """megatron-core's rotary embedding with the model's frequencies.

    Args:
        shape: resolved.
        pg_collection: process groups.
    """
    embedding = RotaryEmbedding(
        kv_channels=shape.kv_channels,
        rotary_percent=shape.rotary_percent,
        rotary_base=shape.rotary_base,
        seq_len_interpolation_factor=shape.rotary_seq_len_interpolation_factor,
        cp_group=pg_collection.cp,
    )
    if shape.use_rope_scaling:
        embedding.inv_freq = llama3_frequencies(embedding.inv_freq, shape)
    return embedding


def llama3_frequencies(frequencies: Tensor, shape: ResolvedModelConfig) -> Tensor:
    """Llama 3.1's scaled frequencies, fp32 [d / 2], from unscaled ones; see the module."""
    low, high = shape.rope_scaling_low_freq_factor, shape.rope_scaling_high_freq_factor
    context = shape.rope_scaling_original_max_position_embeddings
    wave_lengths = 2 * math.pi / frequencies
    stretched = frequencies / shape.rope_scaling_factor
    share_kept = ((context / wave_lengths - low) / (high - low)).clamp(0, 1)
    between = (1 - share_kept) * stretched + share_kept * frequencies
    is_short = wave_lengths < context / high
    is_long = wave_lengths > context / low
    return torch.where(is_short, frequencies, torch.where(is_long, stretched, between))
