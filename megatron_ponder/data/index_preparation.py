"""Builds the sample and shuffle indexes of a run in advance, in one process.

A run also builds them itself, on rank 0. Building them in advance helps when many ranks would wait,
or cannot write to the cache.
"""

from pathlib import Path

from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.config.schema import ParallelConfig
from megatron_ponder.data.datasets import (
    build_datasets,
    build_validation_sets,
    num_samples_needed,
)
from megatron_ponder.data.options import PrepareIndexOptions
from megatron_ponder.data.tokenizers import build_tokenizer
from megatron_ponder.runtime.distributed import running


def prepare_index(options: PrepareIndexOptions, config: ResolvedConfig) -> dict[str, int]:
    """Build what a run with this config would build before its first iteration.

    Returns:
        Number of sequences in each dataset.

    Raises:
        PonderError: the settings or the data are invalid.
    """
    tokenizer = build_tokenizer(config.data, config.model.vocab_size)
    config = resolve(
        config, world_size=options.world_size, tokenizer_vocab_size=tokenizer.vocab_size
    )
    with running(ParallelConfig(distributed_backend="gloo"), config.training.seed):
        num_samples = num_samples_needed(config)
        built = build_datasets(config, tokenizer, num_samples)
        datasets = dict(zip(("train", "valid", "test"), built, strict=True))
        if config.data.multiple_validation_sets:
            sets = build_validation_sets(config, tokenizer, num_samples[1])
            datasets |= {f"valid/{Path(name).name}": each for name, each in sets.items()}
    return {
        name: len(each)  # type: ignore[arg-type]
        for name, each in datasets.items()
        if each is not None
    }
