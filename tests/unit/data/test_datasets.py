"""From prefixes to sequences: splits, blends, repetition, and what is refused."""

from pathlib import Path
from typing import Any

import numpy
import pytest

from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.data.datasets import (
    build_datasets,
    build_validation_sets,
    training_fingerprint,
)
from megatron_ponder.data.indexed import count_unended
from megatron_ponder.data.tokenizers import NullTokenizer
from megatron_ponder.errors import ConfigError, DataError
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
    datasets = build_datasets(_config(**settings), NullTokenizer(VOCAB_SIZE), num_samples)
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


def test_a_blend_without_weights_goes_by_tokens_not_by_documents(tmp_path: Path) -> None:
    """30 documents of 3 tokens and an end, and 10 of 23: 120 tokens and 240."""
    short = corpora.write_ids(tmp_path / "short", [[1, 1, 1]] * 30)
    long = corpora.write_ids(tmp_path / "long", [[51] * 23] * 10)
    train, _, _ = sequences((90, 0, 0), data_path=(short, long), split="1,0,0")
    assert train
    assert sum(51 in sequence for sequence in train[:90]) == pytest.approx(60, abs=1)


@pytest.mark.parametrize("empty", [[], [[]]], ids=["no sequence", "an empty one"])
def test_empty_documents_change_nothing_but_a_split_needs_another(
    empty: list[list[int]], tmp_path: Path
) -> None:
    documents = [[list(range(i, i + 7)) + [VOCAB_SIZE - 1]] for i in range(8)]
    path = corpora.write_sequences(tmp_path / "a", [d for each in documents for d in (empty, each)])
    train, _, _ = sequences((7, 0, 0), data_path=(path,), split="1,0,0")
    assert train and len(train) == 7
    assert {i for sequence in train for i in sequence} <= {*range(15), VOCAB_SIZE - 1}
    last = corpora.write_sequences(tmp_path / "b", [*documents, *[[[]]] * 8])
    with pytest.raises(DataError, match="valid gets none with any token"):
        _sequences((4, 4, 0), {"data_path": (last,), "split": "1,1,0"})


def test_documents_without_an_end_are_counted(tmp_path: Path) -> None:
    ended, unended = [[1, 2, 99]], [[3, 99, 4]]
    for documents, expected in (
        ([ended] * 3, (0, 3)),
        ([ended, [], unended, [[]], [[5], [6, 99]]], (1, 3)),
        ([unended] * 1000, (64, 64)),
    ):
        path = corpora.write_sequences(tmp_path / "a", documents)
        assert count_unended(path, VOCAB_SIZE - 1) == expected


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    few = corpora.write_ids(tmp_path / "few", [[1] * 20, [2] * 20])
    for settings, message in (
        ({"data_path": (few,), "split": "99,1,0"}, "valid gets none"),
        ({"data_path": (few,), "split": "0,100,0"}, "--split 0,100,0: leaves no data to train on"),
        ({"valid_data_path": (few,)}, "no training data"),
        ({"data_path": (str(tmp_path / "none"),)}, "no such file"),
        ({}, "no training data"),
    ):
        with pytest.raises(DataError, match=message):
            _sequences((4, 4, 4), settings)


def test_masks_at_the_end_of_documents(folder: Path) -> None:
    """Megatron's mask leaves out what stands behind an end, the reference's the end itself."""
    settings = {"data_path": (prefix(folder, "low"),), "split": "1,0,0"}
    end = VOCAB_SIZE - 1
    for changes, expected in (
        ({}, lambda token, label: True),
        ({"eod_mask_loss": True}, lambda token, label: token != end),
        ({"eod_as_target": False}, lambda token, label: label != end),
        (
            {"eod_mask_loss": True, "eod_as_target": False},
            lambda token, label: end not in (token, label),
        ),
    ):
        samples = run_ranks(_samples, 1, settings | changes)[0]
        assert len(samples) == 54
        for tokens, labels, mask in samples:
            assert mask == [float(expected(t, i)) for t, i in zip(tokens, labels, strict=True)]


def _samples(settings: dict[str, Any]) -> list[tuple[list, list, list]]:
    """Tokens, labels and loss mask of every training sample; read twice, as loaders do."""
    train, _, _ = build_datasets(_config(**settings), NullTokenizer(VOCAB_SIZE), (54, 0, 0))
    assert train is not None
    train[0]
    keys = ("tokens", "labels", "loss_mask")
    return [tuple(train[i][key].tolist() for key in keys) for i in range(len(train))]


def _config(**settings: Any) -> RunConfig:
    settings = {"seq_length": SEQ_LENGTH, **settings}
    config = RunConfig().replaced(vocab_size=VOCAB_SIZE, tokenizer_type="NullTokenizer", **settings)
    return resolve(config, world_size=1)


@pytest.mark.parametrize("name", ["reset_position_ids", "reset_attention_mask"])
def test_documents_that_cannot_be_kept_apart_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="attention here sees the whole sequence"):
        _config(**{name: True})


def test_each_validation_set_by_itself(folder: Path) -> None:
    found = run_ranks(_validation_sets, 1, (prefix(folder, "low"), prefix(folder, "high")))[0]
    assert list(found) == ["low_text_document", "high_text_document"]
    assert max(max(s) for s in found["low_text_document"] if 99 not in s) < 50
    assert min(min(s) for s in found["high_text_document"]) >= 50


def _validation_sets(prefixes: tuple[str, ...]) -> dict[str, list[list[int]]]:
    config = _config(train_data_path=prefixes[:1], valid_data_path=prefixes)
    sets = build_validation_sets(config, NullTokenizer(VOCAB_SIZE), 5)
    return {name: [each[i]["tokens"].tolist() for i in range(5)] for name, each in sets.items()}


def test_data_written_anew_under_the_same_name_gets_new_indexes(tmp_path: Path) -> None:
    """megatron-core's own cache goes by the name, and would cut the new data as the old."""
    settings = {"split": "1,0,0"}
    for documents in ([[1] * 30] * 4, [[2] * 7] * 9):
        for suffix in (".bin", ".idx", ".manifest.json"):
            for file in tmp_path.glob(f"data*{suffix}"):
                file.unlink()
        path = corpora.write_ids(tmp_path / "data", documents)
        train, _, _ = sequences((8, 0, 0), data_path=(path,), **settings)
        assert train and {i for s in train for i in s} == {documents[0][0], VOCAB_SIZE - 1}
    caches = list((tmp_path / "cache").iterdir())
    assert len(caches) == 2 and not any(path.name.startswith(".") for path in caches)


def test_an_index_that_was_not_finished_is_never_used(tmp_path: Path) -> None:
    path = corpora.write_ids(tmp_path / "data", [[1] * 30] * 4)
    settings = {"data_path": (path,), "split": "1,0,0"}
    expected = sequences((8, 0, 0), **settings)
    (complete,) = (tmp_path / "cache").iterdir()
    for file in complete.glob("*.npy"):
        file.write_bytes(b"")
    complete.rename(complete.with_name(f".{complete.name}.123.unfinished"))
    assert sequences((8, 0, 0), **settings) == expected
    again = sequences((8, 0, 0), **settings)
    assert again == expected


def test_indexes_are_built_once_by_many_ranks_and_may_be_read_only(tmp_path: Path) -> None:
    path = corpora.write_ids(tmp_path / "data", [[i] * 30 for i in range(9)])
    settings = {"data_path": (path,), "split": "1,0,0"}
    first, second = run_ranks(_sequences, 2, (8, 0, 0), settings)
    assert first == second
    (complete,) = (tmp_path / "cache").iterdir()
    before = {file: file.stat().st_mtime_ns for file in complete.iterdir()}
    assert sequences((8, 0, 0), **settings) == first
    assert {file: file.stat().st_mtime_ns for file in complete.iterdir()} == before


def test_the_fingerprint_follows_content_blend_and_order(tmp_path: Path) -> None:
    low = corpora.write_ids(tmp_path / "a" / "low", [[1] * 30] * 4)
    moved = corpora.write_ids(tmp_path / "b" / "other", [[1] * 30] * 4)
    high = corpora.write_ids(tmp_path / "a" / "high", [[2] * 30] * 4)

    blend = {"data_path": ("1", low, "3", high)}
    same = [
        {},
        {"data_path": (moved,)},
        {"data_cache_path": str(tmp_path / "c"), "num_workers": 7},
    ]
    other = [
        {"data_path": (high,)},
        {"data_path": ("1", low, "1", high)},
        {"split": "1,1,1"},
        {"seed": 3},
        {"seq_length": 4},
    ]
    blends = [blend, {"data_path": ("0.25", low, "0.75", high)}]
    blends += [{"data_path": ("3", low, "1", high)}]
    given = [{"data_path": (low,), **settings} for settings in (*same, *other, *blends)]
    (found,) = run_ranks(_fingerprints, 1, given)
    first = found[0]
    assert found[: len(same)] == [first] * len(same)
    assert first not in found[len(same) :]
    weighted, scaled, swapped = found[-3:]
    assert weighted == scaled != swapped


def _fingerprints(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [_fingerprint(each) for each in settings]


def _fingerprint(settings: dict[str, Any]) -> dict[str, Any]:
    config = _config(**settings)
    tokenizer = NullTokenizer(VOCAB_SIZE)
    train, _, _ = build_datasets(config, tokenizer, (4, 0, 0))
    return training_fingerprint(config, tokenizer, train, 4)


def test_an_empty_split_of_which_nothing_is_wanted_is_no_problem(tmp_path: Path) -> None:
    path = corpora.write_ids(tmp_path / "data", [[1] * 30] * 4)
    train, valid, test = sequences((4, 0, 0), data_path=(path,), split="969,30,1")
    assert train and valid is None and test is None


def test_data_of_another_tokenizer_is_refused_with_both_named(folder: Path) -> None:
    data = prefix(folder, "low")
    with pytest.raises(DataError) as caught:
        build_datasets(_config(data_path=(data,)), NullTokenizer(VOCAB_SIZE + 1), (1, 0, 0))
    for named in ("low.manifest.json", "[vocab size 100, eod 99]", "[vocab size 101, eod 100]"):
        assert named in str(caught.value)
    with pytest.raises(DataError, match="another tokenizer"):
        config = _config(valid_data_path=(data,), train_data_path=(data,))
        build_validation_sets(config, NullTokenizer(VOCAB_SIZE + 1), 1)
