"""From prefixes to sequences: splits, blends, repetition, and what is refused."""

from pathlib import Path
from typing import Any

import numpy
import pytest

from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.data.datasets import build_datasets
from megatron_ponder.data.tokenizers import NullTokenizer
from megatron_ponder.errors import DataError
from tests.ranks import run_ranks
from tests.unit.data import corpora

VOCAB_SIZE = 100
SEQ_LENGTH = 8


def sequences(num_samples: tuple[int, int, int], **settings: Any) -> list[list[list[int]] | None]:
    """Tokens of train, valid and test, built inside a rank."""
    return run_ranks(_sequences, 1, num_samples, settings)[0]


def _sequences(
    num_samples: tuple[int, int, int], settings: dict[str, Any]
) -> list[list[list[int]] | None]:
    config = RunConfig().replaced(
        vocab_size=VOCAB_SIZE, seq_length=SEQ_LENGTH, tokenizer_type="NullTokenizer", **settings
    )
    config = resolve(config, world_size=1)
    datasets = build_datasets(config, NullTokenizer(VOCAB_SIZE), num_samples)
    return [
        None if split is None else [split[i]["tokens"].tolist() for i in range(len(split))]
        for split in datasets
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets whose ids tell them apart: low counts 0..39, high 50..89."""
    folder = tmp_path_factory.mktemp("datasets")
    for name, base in (("low", 0), ("high", 50)):
        corpora.write_ids(folder / name, [[base + i] * 10 for i in range(40)])
    return folder


def prefix(folder: Path, name: str) -> str:
    return str(folder / f"{name}_text_document")


def test_split_is_by_documents_and_no_token_is_in_two(folder: Path) -> None:
    train, valid, test = sequences((30, 4, 4), data_path=(prefix(folder, "low"),), split="80,10,10")
    assert train and valid and test
    found = [
        {i for sequence in split for i in sequence if i != VOCAB_SIZE - 1}
        for split in (train, valid, test)
    ]
    assert found[0] <= set(range(32)) and found[1] <= set(range(32, 36))
    assert found[2] <= set(range(36, 40))


def test_an_epoch_has_every_token_once_shuffled_and_more_samples_repeat_it(folder: Path) -> None:
    """40 documents of 11 tokens are 54 sequences of 8 and one label more."""
    settings = {"data_path": (prefix(folder, "low"),), "split": "1,0,0"}
    once, _, _ = sequences((54, 0, 0), **settings)
    assert once and len(once) == 54 and once != sorted(once)
    counts = numpy.bincount([i for s in once for i in s], minlength=VOCAB_SIZE)[:40]
    assert sorted(counts)[1] == 10 and 2 <= min(counts) and max(counts) == 10
    thrice, _, _ = sequences((162, 0, 0), **settings)
    assert thrice and len(thrice) >= 162


def test_own_files_for_each_split(folder: Path) -> None:
    train, valid, test = sequences(
        (20, 5, 0),
        train_data_path=(prefix(folder, "low"),),
        valid_data_path=(prefix(folder, "high"),),
    )
    assert train and valid and test is None
    assert max(i for s in train for i in s if i != 99) < 50 <= min(min(s) for s in valid)


@pytest.mark.parametrize(("blend", "share"), [("3 low 1 high", 0.75), ("low high", 0.5)])
def test_blends(folder: Path, blend: str, share: float) -> None:
    path = tuple(part if part.isdigit() else prefix(folder, part) for part in blend.split())
    train, _, _ = sequences((80, 0, 0), data_path=path, split="1,0,0")
    assert train
    is_low = [min(sequence) < 50 for sequence in train[:80]]
    assert sum(is_low) / 80 == pytest.approx(share, abs=0.02)


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    few = corpora.write_ids(tmp_path / "few", [[1] * 20, [2] * 20])
    for settings, message in (
        ({"data_path": (few,), "split": "99,1,0"}, "valid gets none"),
        ({"data_path": (str(tmp_path / "none"),)}, "no such file"),
        ({}, "no training data"),
    ):
        with pytest.raises(DataError, match=message):
            _sequences((4, 4, 4), settings)
