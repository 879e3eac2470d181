"""A run's settings with every derived value filled in: what `config.resolve` returns.

The same groups as in schema.py. The fields that `None` left open there have their plain types here,
so the type checker proves that code behind `resolve` never meets such a `None`. `field()` removes
the default that a field has in its parent.
"""

import dataclasses
from typing import Any

from megatron_ponder.config.schema import ModelConfig, OptimizerConfig, RunConfig, TrainingConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedModelConfig(ModelConfig):
    """Shape of the transformer, complete."""

    ffn_hidden_size: int = dataclasses.field()
    num_query_groups: int = dataclasses.field()
    kv_channels: int = dataclasses.field()
    max_position_embeddings: int = dataclasses.field()
    vocab_size: int = dataclasses.field()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedTrainingConfig(TrainingConfig):
    """Length, batch and precision of the run, complete."""

    global_batch_size: int = dataclasses.field()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedOptimizerConfig(OptimizerConfig):
    """AdamW and its learning-rate schedule, complete."""

    min_lr: float = dataclasses.field()
    lr_decay_iters: int = dataclasses.field()
    lr_warmup_iters: int = dataclasses.field()
    lr_wsd_decay_iters: int = dataclasses.field()


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedConfig(RunConfig):
    """A whole run, complete. Only `config.resolve` makes one."""

    model: ResolvedModelConfig = dataclasses.field()
    training: ResolvedTrainingConfig = dataclasses.field()
    optimizer: ResolvedOptimizerConfig = dataclasses.field()
    given: RunConfig = dataclasses.field(compare=False, repr=False)
    """The config that this one was resolved from. Checkpoints store both."""

    def replaced(self, **changes: Any) -> "ResolvedConfig":
        """A copy with some settings changed. Values derived from them stay as they are.

        Where that is wrong, or the changes may not fit the rest, resolve the copy again.

        Raises:
            KeyError: a name that is no setting.
        """
        return self.from_flat_dict(
            super().replaced(**changes).to_flat_dict(), given=self.given.replaced(**changes)
        )
