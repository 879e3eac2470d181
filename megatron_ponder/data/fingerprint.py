"""A fingerprint of the training data and its order, small enough to store in a checkpoint.

A checkpoint stores the position in the data as a number of samples. The position is only meaningful
while data, blend, tokenizer, sequence length and seed are unchanged. Moving files does not change
the fingerprint; changing their content does. Not covered: comparing (checkpoint/comparison.py).
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import Any

from megatron.core.datasets.blended_dataset import BlendedDataset
from megatron.core.datasets.gpt_dataset import GPTDataset

from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.data.indexed import data_file, index_file
from megatron_ponder.data.manifest import hash_file
from megatron_ponder.data.tokenizers import Tokenizer

NUM_PROBES, PROBE_BYTES = 64, 1 << 12
"""Samples of a .bin that are hashed. With the hash of the whole .idx they detect changed data."""


def dataset_digest(prefix: str) -> str:
    """Hash of a dataset's content: all of its index, and samples of its ids."""
    stats = [file(prefix).stat() for file in (index_file, data_file)]
    return _digest(prefix, tuple((s.st_size, s.st_mtime_ns, s.st_ino) for s in stats))


def data_fingerprint(
    config: ResolvedConfig,
    tokenizer: Tokenizer,
    blend: tuple[list[str], list[float] | None],
    num_samples: int,
    repeats: bool,
) -> dict[str, Any]:
    """Fingerprint of a run's training data.

    Args:
        config: resolved.
        tokenizer: the run's.
        blend: prefixes and weights of the training data.
        num_samples: sequences that the run reads.
        repeats: whether any dataset is read more than once.

    Returns:
        Plain data, comparable with ==.
    """
    prefixes, weights = blend
    total = sum(weights) if weights else 1.0
    return {
        "data": [dataset_digest(prefix) for prefix in prefixes],
        "blend": [round(weight / total, 9) for weight in weights] if weights else None,
        "split": config.data.split if config.data.data_path else None,
        "tokenizer": dict(tokenizer.unique_identifiers),
        "seq_length": config.data.seq_length,
        "seed": config.training.seed,
        "instruction_data": config.data.instruction_data,
        # megatron-core shuffles all repetitions together: the order depends on their number.
        "samples_of_repeated_data": num_samples if repeats else None,
    }


def is_repeated(dataset: Any) -> bool:
    """Whether megatron-core reads some documents more than once in this dataset."""
    if isinstance(dataset, BlendedDataset):
        return any(is_repeated(part) for part in dataset.datasets)
    if isinstance(dataset, GPTDataset):
        return len(dataset.document_index) > len(dataset.indices)
    return bool(getattr(dataset, "is_repeated", False))


def identity(settings: Mapping[str, Any]) -> str:
    """A hash of settings, for use as a folder name."""
    text = repr(sorted(settings.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@functools.lru_cache(maxsize=4096)
def _digest(prefix: str, files: tuple[tuple[int, int, int], ...]) -> str:
    """`dataset_digest`, cached while the files are unchanged."""
    digest = hashlib.sha256(hash_file(index_file(prefix)).encode())
    size = files[1][0]
    digest.update(str(size).encode())
    with data_file(prefix).open("rb") as file:
        for number in range(NUM_PROBES):
            file.seek(max(size - PROBE_BYTES, 0) * number // (NUM_PROBES - 1))
            digest.update(file.read(PROBE_BYTES))
    return digest.hexdigest()[:32]
