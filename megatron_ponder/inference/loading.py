"""Loads a checkpoint folder for evaluation and generation.

The checkpoint holds all settings of the model. It may have been saved under any layout. One process
loads it, or under torchrun several tensor-parallel ranks; inference supports no other layout. Left
out: Hugging Face folders.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_ponder.checkpoint.reader import check_trained_tokenizer, load_weights, locate
from megatron_ponder.checkpoint.stored_config import read_config
from megatron_ponder.config.resolve import resolve_for_inference
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ponder.errors import DataError
from megatron_ponder.inference.logits import whole_logits
from megatron_ponder.inference.options import CheckpointOptions
from megatron_ponder.model.build import build_model
from megatron_ponder.model.ponder_gpt_model import PonderGPTModel
from megatron_ponder.ponder.plan import Pass, PassPlan
from megatron_ponder.runtime.device import device
from megatron_ponder.runtime.distributed import running, world_size_from_environment


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode, with what it was trained with."""

    checkpoint: Path
    """The folder of the iteration that was loaded."""
    config: ResolvedConfig
    """The training run's, for this layout."""
    model: PonderGPTModel
    """Its weights are this rank's."""
    plan: PassPlan
    """The passes of every forward: the training path with the chosen R."""

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        return self.config.model.vocab_size

    @property
    def max_tokens(self) -> int | None:
        """Tokens of the longest text that the model has positions for; None: there is no limit."""
        is_table = self.config.model.position_embedding_type == "learned_absolute"
        return self.config.model.max_position_embeddings if is_table else None

    @torch.no_grad()
    def token_losses(
        self, tokens: Tensor, labels: Tensor, plans: Sequence[PassPlan]
    ) -> list[Tensor]:
        """Cross entropy of the last tokens in nats, fp32 [b, l] per plan, the same on all ranks.

        Passes that plans begin with in common run once.

        Args:
            tokens: int64 [b, s].
            labels: int64 [b, l], the token after each of the last l; l <= s.
            plans: the passes of a forward each.
        """
        labels = labels.to(device())
        embeddings = self.model.embed(tokens.to(device()))
        handed_on: dict[tuple[tuple[Pass, ...], bool], Tensor] = {}
        losses = []
        for plan in plans:
            carry: Tensor | None = None
            for pass_ in plan.passes:
                done = plan.passes[: pass_.index + 1], plan.is_last(pass_)
                if done not in handed_on:
                    handed_on[done] = self.model.run_pass(pass_, plan, embeddings, carry)
                carry = handed_on[done]
            assert carry is not None
            losses.append(self.model.compute_output(carry[-labels.size(1) :], labels))
        return losses

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits fp32 [b, s, v] over the real vocabulary, the same on all ranks.

        Args:
            tokens: int64 [b, s].
        """
        return whole_logits(self.model, self.model.run_passes(tokens.to(device()), self.plan))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the training run.

        Raises:
            DataError: it is not where it was, or is another one.
        """
        # NullTokenizer's size is the given one: method pause may have added a row since.
        given = read_config(self.checkpoint).given.model.vocab_size
        tokenizer = build_tokenizer(self.config.data, given)
        check_trained_tokenizer(self.checkpoint, tokenizer)
        if tokenizer.vocab_size > self.vocab_size:
            raise DataError(
                f"--tokenizer-model {self.config.data.tokenizer_model}: has {tokenizer.vocab_size} "
                f"ids, but the model's vocabulary has {self.vocab_size}. Give the tokenizer that "
                "the model was trained with."
            )
        return tokenizer

    def check_ids(self, ids: Tensor, source: str) -> None:
        """Refuse ids that the embedding has no row for.

        Raises:
            DataError: an id is negative or too large.
        """
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self.vocab_size:
            raise DataError(
                f"{source} has ids from {low} to {high}, but the model's are from 0 to "
                f"{self.vocab_size - 1}. It was made with another tokenizer."
            )


@contextlib.contextmanager
def loaded_model(
    options: CheckpointOptions, num_jacobi_iterations: int | None = None
) -> Iterator[LoadedModel]:
    """A model on this process or on all ranks of torchrun; process groups end with the block.

    Args:
        options: which.
        num_jacobi_iterations: R of its plan; None: the checkpoint's.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be read.
        ConfigError: the number of ranks does not divide the model, or R is negative.
    """
    checkpoint = locate(Path(options.load), options.ckpt_step)
    config = _for_this_layout(read_config(checkpoint), options, num_jacobi_iterations)
    with running(config.parallel, config.training.seed):
        model = build_model(config)
        load_weights(checkpoint, [model], config)
        model.eval()
        yield LoadedModel(
            checkpoint=checkpoint,
            config=config,
            model=model,
            plan=model.method.plan(config.method.num_jacobi_iterations),
        )


def _for_this_layout(
    config: ResolvedConfig, options: CheckpointOptions, num_jacobi_iterations: int | None
) -> ResolvedConfig:
    """The training run's config with all ranks sharing each layer, and what the options change."""
    changes: dict[str, object] = {}
    if num_jacobi_iterations is not None:
        changes["num_jacobi_iterations"] = num_jacobi_iterations
    if options.tokenizer_model is not None:
        changes["tokenizer_model"] = options.tokenizer_model
    return resolve_for_inference(
        config.replaced(**changes), num_ranks=world_size_from_environment()
    )
