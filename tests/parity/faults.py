"""Planted faults: what the parity and golden tests must catch.

Each takes a built model and breaks one thing about the method or the layout.
"""

import dataclasses
from collections.abc import Callable

import torch

from megatron_ponder.kernels.rotary import rotary_table
from megatron_ponder.model.ponder_gpt_model import PonderGPTModel
from megatron_ponder.model.stages import kept_stages
from megatron_ponder.ponder.plan import PassPlan


def _shifted_label(model: PonderGPTModel) -> None:
    """Predict the token itself instead of the next one."""
    original = model.compute_output

    def shifted(read, labels):
        return original(read, None if labels is None else labels.roll(1, dims=1))

    model.compute_output = shifted


def _position_per_slot(model: PonderGPTModel) -> None:
    """Rotary or learned positions count slots instead of tokens."""
    if model.rotary_pos_emb is not None:

        def run_layers_per_slot(pass_, hidden, num_tokens):
            angles = model.rotary_pos_emb(num_tokens * pass_.num_stages)
            table = rotary_table(angles, 1, hidden.dtype)
            kept = kept_stages(pass_)
            return model.decoder(hidden, attention_mask=kept, rotary_pos_emb=table)

        model.run_layers = run_layers_per_slot
        return

    def per_slot(slots, num_stages):
        weight = model.embedding.position_embeddings.weight
        first = slots.size(0) * model.pg_collection.tp.rank() * model.config.sequence_parallel
        positions = torch.arange(first, first + slots.size(0)) % weight.size(0)
        return slots + weight[positions][:, None, :]

    model.embedding.add_positions = per_slot


def _skipped_norm(model: PonderGPTModel) -> None:
    """Feed back hidden states before the final norm."""
    original = model.read

    def without_norm(pass_, hidden):
        if pass_.read_stages.stop == pass_.num_stages and pass_.read_stages.start > 0:
            return original(pass_, hidden)
        return hidden

    model.read = without_norm


def _loss_at_first_stage(model: PonderGPTModel) -> None:
    """Read the next token at the token's own slot instead of its last thought."""
    original = model.run_layers

    def misread(pass_, hidden, num_tokens):
        if pass_.read_stages.start > 0:
            pass_ = dataclasses.replace(pass_, read_stages=range(1))
        return original(pass_, hidden, num_tokens)

    model.run_layers = misread


def _unscaled_embedding(model: PonderGPTModel) -> None:
    """Forget the factor on token embeddings."""
    model.embedding.scale = None


def _one_pass_short(model: PonderGPTModel) -> None:
    """Leave out one Jacobi iteration."""
    original = model.forward

    def short(tokens, labels, plan):
        passes = plan.passes[:-2] + plan.passes[-1:]
        renumbered = tuple(dataclasses.replace(p, index=i) for i, p in enumerate(passes))
        return original(tokens, labels, PassPlan(passes=renumbered))

    model.forward = short


def _norm_gradients_not_summed(model: PonderGPTModel) -> None:
    """Under sequence parallelism, keep each rank's partial gradient of the norms."""
    for parameter in model.parameters():
        parameter.sequence_parallel = False


FAULTS: dict[str, Callable[[PonderGPTModel], None]] = {
    "shifted label": _shifted_label,
    "position per slot": _position_per_slot,
    "skipped norm": _skipped_norm,
    "loss at first stage": _loss_at_first_stage,
    "unscaled embedding": _unscaled_embedding,
    "one pass short": _one_pass_short,
    "norm gradients not summed": _norm_gradients_not_summed,
}
