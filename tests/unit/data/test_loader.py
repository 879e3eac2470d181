"""Samples come in one order, whatever the number of ranks and wherever a run resumes."""

import pytest
import torch
from torch.utils.data import Dataset

from megatron_ponder.data.loader import build_loader
from megatron_ponder.errors import DataError


class Numbers(Dataset):
    """Sample i is the number i."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        value = torch.tensor([index])
        return {"tokens": value, "labels": value, "loss_mask": torch.ones(1), "extra": value}


def samples(
    ranks: int, micro_batch_size: int, consumed: int = 0, workers: int = 0, size: int = 48
) -> list[list[int]]:
    """What each rank reads."""
    return [
        [
            int(i)
            for batch in build_loader(
                Numbers(size),
                micro_batch_size=micro_batch_size,
                data_parallel_rank=rank,
                data_parallel_size=ranks,
                consumed_samples=consumed,
                num_workers=workers,
                vocab_size=1000,
            )
            for i in batch["tokens"]
        ]
        for rank in range(ranks)
    ]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_each_iteration_reads_the_same_samples_on_every_layout(
    ranks: int, micro_batch_size: int
) -> None:
    global_batch_size = 8
    per_rank = global_batch_size // ranks
    read = samples(ranks, micro_batch_size)
    for iteration in range(6):
        mine = slice(iteration * per_rank, (iteration + 1) * per_rank)
        together = sorted(i for rank in read for i in rank[mine])
        assert together == list(range(iteration * 8, (iteration + 1) * 8))


def test_going_on_reads_what_would_have_come_next() -> None:
    whole = samples(2, 2)
    assert samples(2, 2, consumed=16) == [rank[8:] for rank in whole]
    assert samples(1, 4, consumed=16)[0] == list(range(16, 48))


def test_workers_change_neither_order_nor_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    assert samples(2, 2, workers=2) == samples(2, 2)
    assert torch.equal(torch.rand(3), expected)


def test_an_incomplete_micro_batch_is_not_read() -> None:
    assert samples(1, 4, size=10) == [list(range(8))]


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    """The id that equals the vocabulary size is the first of them."""
    settings = {"micro_batch_size": 4, "data_parallel_rank": 0, "data_parallel_size": 1}
    settings |= {"consumed_samples": 0, "num_workers": 0}
    for vocab_size in (6, 7):
        loader = build_loader(Numbers(8), vocab_size=vocab_size, **settings)
        assert next(loader)["tokens"].shape == (4, 1)
        with pytest.raises(DataError, match=f"from 4 to 7, .* ends at {vocab_size - 1}"):
            next(loader)
    assert len(list(build_loader(Numbers(8), vocab_size=8, **settings))) == 2
