"""Planted faults: what the parity and golden tests must catch.

Each takes a built model and breaks one thing about the method or the layout.
"""

import dataclasses
from collections.abc import Callable

import torch

from megatron_ponder.kernels.rotary import rotary_table
from megatron_ponder.model.ponder_gpt_model import PonderGPTModel
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

        def run_layers_per_slot(pass_, hidden):
            angles = model.rotary_pos_emb.get_emb(model._num_tokens(hidden.size(0)))
            table = rotary_table(angles, 1, hidden.dtype)
            model.decoder.set_input_tensor(hidden)
            return model.decoder(
                hidden, attention_mask=None, rotary_pos_emb=table, packed_seq_params=pass_
            )

        model.run_layers = run_layers_per_slot
        return

    if not model.pre_process:
        return

    def per_slot(slots, slots_per_token):
        weight = model.embedding.position_embeddings.weight
        first = slots.size(0) * model.pg_collection.tp.rank() * model.config.sequence_parallel
        positions = torch.arange(first, first + slots.size(0)) % weight.size(0)
        return slots + weight[positions][:, None, :]

    model.embedding.add_positions = per_slot


def _skipped_norm(model: PonderGPTModel) -> None:
    """Feed back hidden states before the final norm."""
    original = model.norm_outputs

    def without_norm(pass_, hidden):
        if pass_.output_slots.stop == pass_.slots_per_token and pass_.output_slots.start > 0:
            return original(pass_, hidden)
        return hidden

    model.norm_outputs = without_norm


def _loss_at_first_stage(model: PonderGPTModel) -> None:
    """Read the next token at the token's own slot instead of its last thought."""
    original = model.run_layers

    def misread(pass_, hidden):
        if pass_.output_slots.start > 0:
            pass_ = dataclasses.replace(pass_, output_slots=range(1))
        return original(pass_, hidden)

    model.run_layers = misread


def _unscaled_embedding(model: PonderGPTModel) -> None:
    """Forget the factor on token embeddings."""
    if model.pre_process:
        model.embedding.word_embeddings.scale = None


def _carry_of_another_micro_batch(model: PonderGPTModel) -> None:
    """Under pipeline parallelism, think on with what another micro-batch thought."""
    original = model._compute_pass
    kept: dict[int, torch.Tensor] = {}

    def swapped(pass_, plan, token_embeddings, received):
        if model.pre_process and received is not None:
            other = kept.get(pass_.index, received).detach()
            kept[pass_.index] = received
            received = received + (other - received.detach())  # its values, our gradient
        return original(pass_, plan, token_embeddings, received)

    model._compute_pass = swapped


def _tied_gradients_not_summed(model: PonderGPTModel) -> None:
    """Leave the gradients of tied embeddings on their stages."""
    if not model.pre_process:
        model.shared_embedding_or_output_weight = lambda: None
    else:
        model.share_embeddings_and_output_weights = False


def _shards_taken_as_contiguous(model: PonderGPTModel) -> None:
    """Under context parallelism, positions as if a rank's two chunks followed each other."""
    contiguous = _Contiguous(model.pg_collection.cp)
    if model.rotary_pos_emb is not None:
        original = model.rotary_pos_emb.get_emb
        model.rotary_pos_emb.get_emb = lambda n: contiguous.undone(original(n))
    else:
        positions = model.embedding.position_embeddings
        positions._local_rows = lambda n: contiguous.local(positions.weight[: n * contiguous.size])


class _Contiguous:
    """Contiguous shards in the place of zig-zag ones."""

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self.rank, self.size = group.rank(), group.size()

    def local(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.chunk(self.size)[self.rank]

    def undone(self, whole: torch.Tensor) -> torch.Tensor:
        """A sequence of which the zig-zag shard is the contiguous shard of `whole`."""
        placed = list(whole.chunk(2 * self.size))
        first, second = self.local(whole).chunk(2)
        placed[self.rank], placed[2 * self.size - 1 - self.rank] = first, second
        return torch.cat(placed)


def _keys_of_the_own_shard_only(model: PonderGPTModel) -> None:
    """Under context parallelism, attend to what the rank has itself."""
    for layer in model.decoder.layers:
        layer.self_attention.core_attention.cp_group = None


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


def _head_norm_gradients_not_summed(model: PonderGPTModel) -> None:
    """Keep each rank's gradient of the norms of queries and keys, from its own heads only."""
    model.config.qk_layernorm = False


def _unscaled_mixture(model: PonderGPTModel) -> None:
    """Mix embeddings as they are stored, not as they are looked up."""
    model.embedding_scale = None


def _mixture_of_the_own_shard(model: PonderGPTModel) -> None:
    """Under tensor parallelism, a softmax over the rank's own part of the vocabulary."""

    def mix(read):
        probabilities = torch.softmax(model.compute_logits(read), dim=-1)
        mixture = torch.matmul(probabilities, model.mixed_embeddings()) * model.embedding_scale
        if model.config.sequence_parallel:
            return mixture.chunk(model.pg_collection.tp.size())[model.pg_collection.tp.rank()]
        return mixture

    model.mix = mix


def _mixture_without_gradient_to_embeddings(model: PonderGPTModel) -> None:
    """Take the embedding table in mixtures for a constant."""
    original = model.mixed_embeddings
    model.mixed_embeddings = lambda: original().detach()


def _replicated_gradients_not_summed(model: PonderGPTModel) -> None:
    """Under pipeline parallelism, leave the gradients of the embedding's copy on their stages."""
    assert hasattr(model, "all_reduce_replicated_embedding")
    model.all_reduce_replicated_embedding = lambda: None


def _norm_in_every_loop(model: PonderGPTModel) -> None:
    """Run the final norm after passes that say it must not."""
    model.norm_outputs = lambda pass_, hidden: model.final_norm(hidden)


def _positions_in_every_loop(model: PonderGPTModel) -> None:
    """Add learned positions to what has them."""
    original = model.add_positions
    model.add_positions = lambda pass_, slots: original(
        dataclasses.replace(pass_, add_positions=True), slots
    )


def _unscaled_pause(model: PonderGPTModel) -> None:
    """Scale tokens, but not the pause tokens behind them."""
    if not model.pre_process:
        return
    original = model.embed

    def embed(tokens):
        embeddings = original(tokens)
        slots_per_token = 1 + len(model.method.extra_token_ids)
        is_token = (torch.arange(embeddings.size(0)) % slots_per_token == 0)[:, None, None]
        return torch.where(is_token, embeddings, embeddings / model.embedding_scale)

    model.embed = embed


def _lost_input(model: PonderGPTModel) -> None:
    """Build the carry of a pass without its input."""
    original = model.build_carry

    def build_carry(pass_, read, pass_input):
        kept = None if pass_input is None else torch.zeros_like(pass_input)
        return original(pass_, read, kept)

    model.build_carry = build_carry


FAULTS: dict[str, Callable[[PonderGPTModel], None]] = {
    "shifted label": _shifted_label,
    "position per slot": _position_per_slot,
    "skipped norm": _skipped_norm,
    "loss at first stage": _loss_at_first_stage,
    "unscaled embedding": _unscaled_embedding,
    "one pass short": _one_pass_short,
    "norm gradients not summed": _norm_gradients_not_summed,
    "head norm gradients not summed": _head_norm_gradients_not_summed,
    "carry of another micro-batch": _carry_of_another_micro_batch,
    "tied gradients not summed": _tied_gradients_not_summed,
    "shards taken as contiguous": _shards_taken_as_contiguous,
    "keys of the own shard only": _keys_of_the_own_shard_only,
    "unscaled mixture": _unscaled_mixture,
    "mixture of the own shard": _mixture_of_the_own_shard,
    "mixture without gradient to embeddings": _mixture_without_gradient_to_embeddings,
    "replicated gradients not summed": _replicated_gradients_not_summed,
    "norm in every loop": _norm_in_every_loop,
    "positions in every loop": _positions_in_every_loop,
    "unscaled pause": _unscaled_pause,
    "lost input": _lost_input,
}
