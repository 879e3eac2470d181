"""Builds the training, validation and test sets from megatron-core's blended GPT datasets.

megatron-core concatenates documents (each ends with the tokenizer's end id), cuts them into
sequences of seq_length tokens, and shuffles these. Its indexes are cached (index_cache.py).
Attention is not masked between documents. Not covered: loading (loader.py).
"""

import importlib.metadata
import logging
from pathlib import Path
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.utils import Split
from torch import Tensor
from torch.utils.data import Dataset

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.config.schema import DataConfig
from megatron_ponder.data.fingerprint import data_fingerprint, dataset_digest, is_repeated
from megatron_ponder.data.index_cache import build_once
from megatron_ponder.data.indexed import (
    IndexedDatasetSize,
    check_indexed_dataset,
    count_unended,
    index_file,
    open_index,
)
from megatron_ponder.data.instruction_dataset import (
    InstructionDataset,
    check_instruction_dataset,
    check_kind,
)
from megatron_ponder.data.manifest import check_tokenizer
from megatron_ponder.data.tokenizers import Tokenizer
from megatron_ponder.errors import DataError

logger = logging.getLogger(__name__)

Blend = tuple[list[str], list[float] | None]
Datasets = tuple[Dataset[Any] | None, Dataset[Any] | None, Dataset[Any] | None]
Sizes = dict[str, IndexedDatasetSize]


def num_samples_needed(config: ResolvedConfig) -> tuple[int, int, int]:
    """Number of sequences that training, one validation and the test read."""
    training = config.training
    num_evaluation = training.eval_iters * training.global_batch_size
    return training.train_iters * training.global_batch_size, num_evaluation, num_evaluation


def build_datasets(
    config: ResolvedConfig, tokenizer: Tokenizer, num_samples: tuple[int, int, int]
) -> Datasets:
    """Build the datasets of a run. Called on every rank; rank 0 builds missing indexes first.

    Args:
        config: resolved.
        tokenizer: the tokenizer that the data was made with.
        num_samples: sequences for training, validation and test. A dataset with fewer is repeated,
            in a new order each time.

    Returns:
        Train, valid and test; None for a split without data, or of which no sequence is needed.

    Raises:
        DataError: files are missing or damaged, a split has no document, or a dataset is of another
            kind or tokenizer.
    """
    data = config.data
    blends = _blends(data)
    sizes = {prefix: _checked(config, tokenizer, prefix) for prefix in _prefixes(blends)}
    blends = [_with_weights(blend, sizes) if blend else None for blend in blends]
    if data.data_path:
        _check_splits(data, num_samples, sizes)
    for prefix in () if data.instruction_data else sizes:
        _warn_of_unended(prefix, tokenizer.eod)
    built = _build(config, tokenizer, blends, sizes, num_samples)
    if num_samples[Split.valid.value] and built[Split.valid.value] is None:
        logger.info("no validation: --split or the paths given leave no data for it")
    return built


def build_validation_sets(
    config: ResolvedConfig, tokenizer: Tokenizer, num_samples: int
) -> dict[str, Dataset[Any]]:
    """Each dataset of --valid-data-path separately, by name; weights are ignored.

    Raises:
        DataError: as for `build_datasets`, or two datasets have the same name.
    """
    prefixes, _ = _parse_blend(config.data.valid_data_path)
    names = [Path(prefix).name for prefix in prefixes]
    if len(set(names)) < len(names):
        raise DataError(
            f"--valid-data-path {' '.join(prefixes)}: two datasets have the same name. "
            "--multiple-validation-sets reports each by its name; rename one."
        )
    sets = {}
    for name, prefix in zip(names, prefixes, strict=True):
        sizes = {prefix: _checked(config, tokenizer, prefix)}
        blends: list[Blend | None] = [None, ([prefix], None), None]
        _, valid, _ = _build(config, tokenizer, blends, sizes, (0, num_samples, 0))
        assert valid is not None
        sets[name] = valid
    return sets


def training_fingerprint(
    config: ResolvedConfig, tokenizer: Tokenizer, train: Dataset[Any] | None, num_samples: int
) -> dict[str, Any]:
    """What must be unchanged when a run resumes; see fingerprint.py.

    Args:
        config: resolved.
        tokenizer: the run's.
        train: from `build_datasets`.
        num_samples: sequences that training reads.
    """
    blend = _blends(config.data)[0]
    assert blend is not None
    inner = train.inner if isinstance(train, _WithoutEndTargets) else train
    return data_fingerprint(config, tokenizer, blend, num_samples, is_repeated(inner))


class _WithoutEndTargets(Dataset[Any]):
    """Samples whose loss mask excludes predictions of the end id."""

    def __init__(self, inner: Dataset[Any], eod: int) -> None:
        self.inner, self._eod = inner, eod

    def __len__(self) -> int:
        return len(self.inner)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.inner[index]
        return {**sample, "loss_mask": sample["loss_mask"] * (sample["labels"] != self._eod)}


def _checked(config: ResolvedConfig, tokenizer: Tokenizer, prefix: str) -> IndexedDatasetSize:
    """Check that a dataset is whole and is what the run takes it for."""
    size = check_indexed_dataset(prefix)
    check_kind(prefix, instruction_data=config.data.instruction_data)
    try:
        check_tokenizer(prefix, tokenizer)
    except DataError as error:
        if not config.checkpoint.override_data:
            raise DataError(f"{error} --override-data trains on it as it is.") from None
        logger.warning("--override-data: %s", error)
    return size


def _build(
    config: ResolvedConfig,
    tokenizer: Tokenizer,
    blends: list[Blend | None],
    sizes: Sizes,
    num_samples: tuple[int, int, int],
) -> Datasets:
    """Build datasets from blends that have been checked."""
    if config.data.instruction_data:
        return _instruction_datasets(config, tokenizer, blends, sizes, num_samples)
    train, valid, test = _document_datasets(config, tokenizer, blends, num_samples)
    if config.data.eod_as_target:
        return train, valid, test
    return tuple(  # type: ignore[return-value]
        None if dataset is None else _WithoutEndTargets(dataset, tokenizer.eod)
        for dataset in (train, valid, test)
    )


def _document_datasets(
    config: ResolvedConfig,
    tokenizer: Tokenizer,
    blends: list[Blend | None],
    num_samples: tuple[int, int, int],
) -> Datasets:
    """Datasets of megatron-core, with indexes that are built once."""
    data = config.data
    blend_options: dict[str, Any] = {"blend": blends[0], "split": data.split}
    if not data.data_path:
        wanted = [b if n else None for b, n in zip(blends, num_samples, strict=True)]
        blend_options = {"blend_per_split": wanted, "split": None}
    prefixes = _prefixes(blends)

    def build(cache: str) -> Datasets:
        dataset_config = GPTDatasetConfig(
            random_seed=config.training.seed,
            sequence_length=data.seq_length,
            path_to_cache=cache,
            tokenizer=tokenizer,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=data.eod_mask_loss,
            create_attention_mask=False,
            **blend_options,
        )
        for split in Split:
            # Do not build a split of which no sample is needed. megatron-core asks for at least one
            # token of every split, and would repeat a split without documents forever.
            if num_samples[split.value] == 0 and dataset_config.split_matrix is not None:
                dataset_config.split_matrix[split.value] = None
        train, valid, test = BlendedMegatronDatasetBuilder(
            GPTDataset, list(num_samples), lambda: True, dataset_config
        ).build()
        return train, valid, test

    settings = {
        "prefixes": prefixes,
        "content": [dataset_digest(prefix) for prefix in prefixes],
        "blends": blend_options,
        "num_samples": num_samples,
        "seq_length": data.seq_length,
        "seed": config.training.seed,
        "tokenizer": sorted(tokenizer.unique_identifiers.items()),
        "megatron-core": importlib.metadata.version("megatron-core"),
    }
    cache = Path(data.data_cache_path or Path(prefixes[0]).parent / "cache")
    return build_once(cache, settings, build)


def _instruction_datasets(
    config: ResolvedConfig,
    tokenizer: Tokenizer,
    blends: list[Blend | None],
    sizes: Sizes,
    num_samples: tuple[int, int, int],
) -> Datasets:
    """Datasets of packed conversations; each split takes one dataset."""
    data = config.data
    for prefix in _prefixes(blends):
        check_instruction_dataset(prefix)
    if any(blend is not None and len(blend[0]) > 1 for blend in blends):
        raise DataError(
            "--instruction-data takes one dataset for each split; merge them with "
            "tools/merge_datasets.py (ids and loss masks separately)."
        )
    bounds = _bounds(data.split)
    built: list[Dataset[Any] | None] = []
    for split in Split:
        blend = blends[0] if data.data_path else blends[split.value]
        if blend is None or num_samples[split.value] == 0:
            built.append(None)
            continue
        (prefix,) = blend[0]
        documents = range(sizes[prefix].num_sequences)
        if data.data_path:
            documents = _documents_of(bounds, split, sizes[prefix])
        if not documents:  # a share of 0
            built.append(None)
            continue
        built.append(
            InstructionDataset(
                prefix,
                documents=documents,
                num_samples=num_samples[split.value],
                seq_length=data.seq_length,
                seed=config.training.seed,
                pad=tokenizer.eod,
            )
        )
    return built[0], built[1], built[2]


def _blends(data: DataConfig) -> list[Blend | None]:
    """One blend per split; with --data-path, a single blend for all splits."""
    if data.data_path:
        return [_parse_blend(data.data_path)]
    if not data.train_data_path:
        raise DataError(
            "no training data: give --data-path, or --train-data-path (and --valid-data-path). To "
            "score a dataset with a trained model, use tools/evaluate.py --data-path."
        )
    paths = (data.train_data_path, data.valid_data_path, data.test_data_path)
    return [_parse_blend(path) if path else None for path in paths]


def _parse_blend(path: tuple[str, ...]) -> Blend:
    """Prefixes, and their weights if any were given."""
    try:
        weights = [float(weight) for weight in path[0::2]]
    except ValueError:
        return list(path), None
    return list(path[1::2]), weights


def _with_weights(blend: Blend, sizes: Sizes) -> Blend:
    """Weight several prefixes without weights by their tokens.

    Without weights megatron-core would stop after one epoch. A single prefix is not blended.
    """
    prefixes, weights = blend
    if len(prefixes) == 1:
        return prefixes, None
    return prefixes, weights or [float(sizes[prefix].num_tokens) for prefix in prefixes]


def _prefixes(blends: list[Blend | None]) -> list[str]:
    """Every prefix once, in order."""
    return list(dict.fromkeys(prefix for blend in blends if blend for prefix in blend[0]))


def _warn_of_unended(prefix: str, eod: int) -> None:
    """Say that documents have no end, which a run cannot repair."""
    num_unended, number = count_unended(prefix, eod)
    if num_unended:
        logger.warning(
            "%s: %d of %d documents looked at do not end with the tokenizer's end id %d, so a "
            "document and the next one are one text to the model, and it never learns to end one. "
            "Preprocess the corpus with --append-eod if it has documents",
            prefix,
            num_unended,
            number,
            eod,
        )


def _check_splits(data: DataConfig, num_samples: tuple[int, int, int], sizes: Sizes) -> None:
    """Refuse splits that need documents and get none; megatron-core would loop forever."""
    bounds = _bounds(data.split)
    if bounds[1] == 0 and num_samples[Split.train.value] > 0:
        raise DataError(
            f"--split {data.split}: leaves no data to train on. Give training a larger share than "
            "0; to score a dataset with a trained model, use tools/evaluate.py --data-path."
        )
    for prefix, size in sizes.items():
        for split in Split:
            begin, end = bounds[split.value], bounds[split.value + 1]
            documents = _documents_of(bounds, split, size)
            if end <= begin or num_samples[split.value] == 0:
                continue
            if not open_index(index_file(prefix)).lengths[documents.start : documents.stop].any():
                raise DataError(
                    f"{prefix}: {size.num_documents} documents are too few for --split "
                    f"{data.split}: {split.name} gets none with any token. Give {split.name} a "
                    "larger share or 0, or set --eval-iters 0."
                )


def _bounds(split: str) -> list[float]:
    """Boundaries of the splits, as fractions from 0 to 1."""
    shares = [float(share) for share in split.split(",")]
    return [sum(shares[:i]) / sum(shares) for i in range(len(shares) + 1)]


def _documents_of(bounds: list[float], split: Split, size: IndexedDatasetSize) -> range:
    """The sequences of a split, with megatron-core's rounding."""
    begin, end = bounds[split.value], bounds[split.value + 1]
    return range(round(begin * size.num_sequences), round(end * size.num_sequences))
