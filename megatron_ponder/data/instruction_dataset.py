"""Packs whole conversations into sequences for supervised fine-tuning.

Conversations are shuffled anew in each epoch and packed in that order; when the next one does not
fit, the rest of the sequence is padding without loss. Only a conversation that is longer than a
sequence is truncated. Attention also sees the previous conversations of the same sequence. Not
covered: tokenization (conversations.py).
"""

import logging
from typing import Any

import numpy
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor
from torch.utils.data import Dataset

from megatron_ponder.data.conversations import IDS_STREAM, MASK_STREAM
from megatron_ponder.data.indexed import check_indexed_dataset, index_file, open_index
from megatron_ponder.data.manifest import find_manifest
from megatron_ponder.errors import DataError

logger = logging.getLogger(__name__)


def mask_prefix(prefix: str) -> str:
    """Prefix of the loss mask that belongs to a dataset of conversations.

    Raises:
        DataError: the prefix is not named as preprocessing with --instruction-data names it.
    """
    if not prefix.endswith(IDS_STREAM):
        raise DataError(
            f"{prefix}: is not a dataset of conversations: the prefix must be one that ends in "
            f"{IDS_STREAM}, as tools/preprocess_data.py --instruction-data writes it."
        )
    return prefix.removesuffix(IDS_STREAM) + MASK_STREAM


def check_kind(prefix: str, *, instruction_data: bool) -> None:
    """Refuse conversations where documents are expected, or the reverse.

    The manifest says what a dataset holds; without one, its name and the mask beside it.

    Raises:
        DataError: the dataset is of the other kind.
    """
    found = find_manifest(prefix)
    options = found[1].get("options") if found else None
    if isinstance(options, dict):
        is_conversations = bool(options.get("instruction_data"))
    else:
        stems = [prefix.removesuffix(s) for s in (IDS_STREAM, MASK_STREAM) if prefix.endswith(s)]
        is_conversations = any(index_file(stem + MASK_STREAM).exists() for stem in stems)
    if is_conversations and not instruction_data:
        raise DataError(
            f"{prefix} holds conversations, of which only the responses count. Give "
            "--instruction-data to train on it, or a dataset of documents."
        )
    if instruction_data and not is_conversations:
        raise DataError(
            f"{prefix}: is not a dataset of conversations. Leave --instruction-data out, or give a "
            f"prefix that ends in {IDS_STREAM}, as tools/preprocess_data.py --instruction-data "
            "writes it."
        )


def check_instruction_dataset(prefix: str) -> None:
    """Check that every conversation has a loss mask of the same length.

    Raises:
        DataError: a file is missing or damaged, or the two do not belong together.
    """
    check_indexed_dataset(prefix)
    mask = mask_prefix(prefix)
    check_indexed_dataset(mask)
    lengths, others = (open_index(index_file(p)).lengths for p in (prefix, mask))
    if not numpy.array_equal(lengths, others):
        raise DataError(
            f"{mask}: belongs to other conversations than {prefix}; preprocess them again."
        )


class InstructionDataset(Dataset[Any]):
    """A given number of sequences of packed conversations."""

    def __init__(
        self,
        prefix: str,
        *,
        documents: range,
        num_samples: int,
        seq_length: int,
        seed: int,
        pad: int,
    ) -> None:
        """Plan the sequences.

        Args:
            prefix: dataset of the ids.
            documents: indexes of the conversations to use.
            num_samples: number of sequences; conversations are repeated if there are too few.
            seq_length: tokens per sequence.
            seed: seed of the order.
            pad: id of the padding.
        """
        self._ids = IndexedDataset(prefix)
        self._mask = IndexedDataset(mask_prefix(prefix))
        self._seq_length, self._pad = seq_length, pad
        lengths = numpy.asarray(self._ids.sequence_lengths)[documents.start : documents.stop]
        num_cut = int((lengths > seq_length + 1).sum())
        if num_cut:
            logger.warning(
                "%s: %d of %d conversations are longer than --seq-length and are truncated",
                prefix,
                num_cut,
                len(lengths),
            )
        self._packs: list[numpy.ndarray] = []
        epoch = 0
        while len(self._packs) < num_samples:
            order = numpy.random.RandomState([seed, epoch]).permutation(len(lengths))
            self._packs += _pack(order, lengths[order], seq_length + 1)
            epoch += 1
        self.is_repeated = epoch > 1
        self._first = documents.start

    def __len__(self) -> int:
        return len(self._packs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`tokens`, `labels`: int64 [s]; `loss_mask`: fp32 [s], 1 where the label counts."""
        size = self._seq_length + 1
        chosen = [self._first + int(number) for number in self._packs[index]]
        ids = _filled([self._ids[each] for each in chosen], size, self._pad)
        mask = _filled([self._mask[each] for each in chosen], size, 0)
        return {
            "tokens": ids[:-1].clone(),
            "labels": ids[1:].clone(),
            "loss_mask": mask[1:].to(torch.float32),
        }


def _pack(order: numpy.ndarray, lengths: numpy.ndarray, size: int) -> list[numpy.ndarray]:
    """Cut an order of conversations into sequences of at most `size` tokens."""
    cuts = []
    used = 0
    for place, length in enumerate(lengths.tolist()):
        if used and used + length > size:
            cuts.append(place)
            used = 0
        used += length
    return numpy.split(order, cuts)


def _filled(parts: list[Any], size: int, padding: int) -> Tensor:
    """Concatenate parts, then truncate or pad to `size`."""
    joined = numpy.concatenate(parts).astype(numpy.int64)[:size]
    filled = numpy.full(size, padding, numpy.int64)
    filled[: len(joined)] = joined
    return torch.from_numpy(filled)
