"""From a checkpoint folder to a model that can be asked for losses and logits.

The checkpoint says everything about the model. It may have been saved by any layout; it is read by
one process, or under torchrun by ranks that all share each layer's weights (tensor parallelism): a
model that is only read needs no other layout here. Left out: keeping keys and values between
forwards, and Hugging Face folders.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_ponder.checkpoint.reader import load_weights, locate, read_config
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ponder.errors import ConfigError, DataError
from megatron_ponder.inference.options import CheckpointOptions
from megatron_ponder.model.build import build_model
from megatron_ponder.model.ponder_gpt_model import PonderGPTModel
from megatron_ponder.ponder.plan import PassPlan
from megatron_ponder.runtime.device import device
from megatron_ponder.runtime.distributed import (
    running,
    tensor_parallel_group,
    world_size_from_environment,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A model in evaluation mode, with what it was trained with."""

    checkpoint: Path
    """The folder of the iteration that was loaded."""
    config: RunConfig
    """The training run's, for this layout."""
    model: PonderGPTModel
    """Its weights are this rank's."""
    plan: PassPlan
    """The passes of every forward: the training path with the chosen R."""

    @property
    def vocab_size(self) -> int:
        """Ids are below this."""
        assert self.config.model.vocab_size is not None
        return self.config.model.vocab_size

    @torch.no_grad()
    def token_losses(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of each token in nats, fp32 [b, s], the same on all ranks.

        Args:
            tokens: int64 [b, s].
            labels: int64 [b, s], the token after each.
        """
        return self.model(tokens.to(device()), labels.to(device()), self.plan)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Logits fp32 [b, s, v] over the real vocabulary, the same on all ranks.

        Args:
            tokens: int64 [b, s].
        """
        local = self.model(tokens.to(device()), None, self.plan).contiguous()
        whole = gather_from_tensor_model_parallel_region(local, group=tensor_parallel_group())
        return whole[..., : self.vocab_size].float()

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the training run.

        Raises:
            DataError: it is not where it was, or is another one.
        """
        tokenizer = build_tokenizer(self.config.data, self.config.model.vocab_size)
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
def loaded_model(options: CheckpointOptions) -> Iterator[LoadedModel]:
    """A model on this process or on all ranks of torchrun; process groups end with the block.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be read.
        ConfigError: the number of ranks does not divide the model, or R is negative.
    """
    checkpoint = locate(Path(options.load), options.ckpt_step)
    config = _for_this_layout(read_config(checkpoint), options)
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


def _for_this_layout(config: RunConfig, options: CheckpointOptions) -> RunConfig:
    """The training run's config with all ranks sharing each layer, and what the options change."""
    changes: dict[str, object] = {}
    if options.num_jacobi_iterations is not None:
        if options.num_jacobi_iterations < 0:
            raise ConfigError(
                f"--num-jacobi-iterations {options.num_jacobi_iterations}: must be at least 0."
            )
        changes["num_jacobi_iterations"] = options.num_jacobi_iterations
    if options.tokenizer_model is not None:
        changes["tokenizer_model"] = options.tokenizer_model
    world_size = world_size_from_environment()
    here = config.replaced(
        tensor_model_parallel_size=world_size,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        sequence_parallel=False,
        use_distributed_optimizer=False,
        micro_batch_size=1,
        global_batch_size=1,
        load=None,
        save=None,
        save_interval=None,
        ckpt_step=None,
        finetune=False,
        **changes,
    )
    return resolve(here, world_size=world_size, tokenizer_vocab_size=None)
