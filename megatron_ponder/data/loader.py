"""Loads micro-batches for one data-parallel rank, in an order that does not depend on the layout.

The samples of training iteration i (from 0) are i*g .. (i+1)*g - 1 of the dataset, g being the
global batch size. Ranks take them in turn, one micro-batch each. So the position in the data is one
number, `consumed_samples`, and resuming needs nothing else.
"""

import signal
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from megatron_ponder.errors import DataError

KEYS = ("tokens", "labels", "loss_mask")


def build_loader(
    dataset: Dataset[Any],
    *,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    consumed_samples: int,
    num_workers: int,
    vocab_size: int,
) -> Iterator[dict[str, Tensor]]:
    """Micro-batches of this rank, from the position of the run to the end of the dataset.

    Args:
        dataset: from `build_datasets`.
        micro_batch_size: sequences per batch.
        data_parallel_rank: rank of this process in its data-parallel group.
        data_parallel_size: number of ranks that share the samples.
        consumed_samples: samples that all ranks together have consumed before.
        num_workers: loader processes; 0 loads in this process.
        vocab_size: ids must be below this.

    Yields:
        `tokens`, `labels`: int64 [b, s]; `loss_mask`: fp32 [b, s]; on the CPU, pinned if CUDA is
        available.

    Raises:
        DataError: an id is not within the vocabulary.
    """
    loader = DataLoader(
        dataset,
        batch_sampler=_MicroBatches(
            num_samples=len(dataset),  # type: ignore[arg-type]
            first_sample=consumed_samples + data_parallel_rank * micro_batch_size,
            micro_batch_size=micro_batch_size,
            stride=data_parallel_size * micro_batch_size,
        ),
        collate_fn=_collate,
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_ignore_signals,
        # A loader draws a number when it starts. From the default generator, which dropout on CPU
        # uses, it would do so at different iterations in a resumed run.
        generator=torch.Generator(),
    )
    for batch in loader:
        ids = torch.stack((batch["tokens"], batch["labels"]))
        smallest, largest = int(ids.min()), int(ids.max())
        if smallest < 0 or largest >= vocab_size:
            raise DataError(
                f"the data has token ids from {smallest} to {largest}, but the model's vocabulary "
                f"ends at {vocab_size - 1}. The data was made with another tokenizer: give the "
                "--tokenizer-model and --vocab-size it was made with, or preprocess the corpus "
                "with this one."
            )
        yield batch


class _MicroBatches(torch.utils.data.Sampler[list[int]]):
    """One micro-batch of consecutive samples every `stride` samples."""

    def __init__(
        self, *, num_samples: int, first_sample: int, micro_batch_size: int, stride: int
    ) -> None:
        self._starts = range(first_sample, num_samples - micro_batch_size + 1, stride)
        self._micro_batch_size = micro_batch_size

    def __iter__(self) -> Iterator[list[int]]:
        for start in self._starts:
            yield list(range(start, start + self._micro_batch_size))

    def __len__(self) -> int:
        return len(self._starts)


def _ignore_signals(worker: int) -> None:
    """Ignore signals; the training process handles them and finishes its iteration first."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack the tensors that training uses."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in KEYS}
