"""Training, validation and test sequences on megatron-core's blended GPT datasets.

Documents are concatenated (they end with the tokenizer's end id), cut into sequences of seq_length
tokens, and shuffled by megatron-core, which keeps the indexes in a cache. There is no masking
between documents. Left out: loading (loader.py).
"""

from pathlib import Path

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch.utils.data import Dataset

from megatron_ponder.config.schema import DataConfig, RunConfig
from megatron_ponder.data.indexed import IndexedDatasetSize, check_indexed_dataset
from megatron_ponder.data.tokenizers import Tokenizer
from megatron_ponder.errors import DataError

Blend = tuple[list[str], list[float] | None]
Datasets = tuple[Dataset | None, Dataset | None, Dataset | None]


def build_datasets(
    config: RunConfig, tokenizer: Tokenizer, num_samples: tuple[int, int, int]
) -> Datasets:
    """The datasets of a run; every rank calls this, and rank 0 builds missing indexes first.

    Args:
        config: resolved.
        tokenizer: the one that the data was made with.
        num_samples: sequences to draw for training, validation and test. Where a dataset has fewer,
            it is repeated, shuffled anew.

    Returns:
        Train, valid and test; None where there is no data for it.

    Raises:
        DataError: files are missing or damaged, or a split has no document.
    """
    data = config.data
    blends = _blends(data)
    sizes = {prefix: check_indexed_dataset(prefix) for prefix in _prefixes(blends)}
    blends = [_with_weights(blend, sizes) if blend else None for blend in blends]
    if data.data_path:
        _check_splits(data, num_samples, sizes)
    first_prefix = next(iter(sizes))
    dataset_config = GPTDatasetConfig(
        random_seed=config.training.seed,
        sequence_length=data.seq_length,
        blend=blends[0] if data.data_path else None,
        blend_per_split=None if data.data_path else blends,
        split=data.split if data.data_path else None,
        path_to_cache=data.data_cache_path or str(Path(first_prefix).parent / "cache"),
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    builder = BlendedMegatronDatasetBuilder(
        GPTDataset, list(num_samples), lambda: True, dataset_config
    )
    train, valid, test = builder.build()
    return train, valid, test


def _blends(data: DataConfig) -> list[Blend | None]:
    """The blends per split; --data-path is the first of one."""
    if data.data_path:
        return [_parse_blend(data.data_path)]
    if not data.train_data_path:
        raise DataError(
            "no training data: give --data-path, or --train-data-path (and --valid-data-path)."
        )
    paths = (data.train_data_path, data.valid_data_path, data.test_data_path)
    return [_parse_blend(path) if path else None for path in paths]


def _parse_blend(path: tuple[str, ...]) -> Blend:
    """Prefixes with their weights, or without any."""
    try:
        weights = [float(weight) for weight in path[0::2]]
    except ValueError:
        return list(path), None
    return list(path[1::2]), weights


def _with_weights(blend: Blend, sizes: dict[str, IndexedDatasetSize]) -> Blend:
    """Several prefixes without weights are drawn from in proportion to their tokens.

    (megatron-core would stop after one pass over them.) A single one is not blended at all.
    """
    prefixes, weights = blend
    if len(prefixes) == 1:
        return prefixes, None
    return prefixes, weights or [float(sizes[prefix].num_tokens) for prefix in prefixes]


def _prefixes(blends: list[Blend | None]) -> list[str]:
    """Every prefix once, in order."""
    return list(dict.fromkeys(prefix for blend in blends if blend for prefix in blend[0]))


def _check_splits(
    data: DataConfig, num_samples: tuple[int, int, int], sizes: dict[str, IndexedDatasetSize]
) -> None:
    """Refuse splits that want documents and get none; megatron-core would look for them forever."""
    shares = [float(share) for share in data.split.split(",")]
    bounds = [sum(shares[:i]) / sum(shares) for i in range(len(shares) + 1)]
    for prefix, size in sizes.items():
        for split in Split:
            begin, end = bounds[split.value], bounds[split.value + 1]
            num_documents = round(end * size.num_documents) - round(begin * size.num_documents)
            if end > begin and num_documents == 0 and num_samples[split.value] > 0:
                raise DataError(
                    f"{prefix}: {size.num_documents} documents are too few for --split "
                    f"{data.split}: {split.name} gets none. Give {split.name} a larger share or 0, "
                    "or set --eval-iters 0."
                )
