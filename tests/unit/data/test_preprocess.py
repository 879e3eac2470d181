"""A corpus becomes exactly the files that megatron-core's own builder writes, or nothing."""

from pathlib import Path

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ponder.data.indexed import check_indexed_dataset
from megatron_ponder.errors import DataError
from tests.unit.data import corpora
from tests.unit.data.corpora import run_preprocess


def files(prefix: Path, key: str = "text") -> tuple[bytes, bytes]:
    return tuple(Path(f"{prefix}_{key}_document.{s}").read_bytes() for s in ("bin", "idx"))  # type: ignore[return-value]


def test_bytes_are_those_of_megatrons_builder(tmp_path: Path, tokenizer_model: str) -> None:
    documents = [*corpora.texts(), *corpora.HARD_TEXTS]
    corpus = corpora.write_json_lines(tmp_path / "c.jsonl", documents)
    summary = run_preprocess(corpus, tmp_path / "ours", tokenizer_model=tokenizer_model)
    builder = IndexedDatasetBuilder(str(tmp_path / "theirs_text_document.bin"), dtype=numpy.uint16)
    num_tokens = 0
    for text in documents:
        ids = [*corpora.encode(tokenizer_model, text), 2]
        builder.add_document(torch.tensor(ids), [len(ids)])
        num_tokens += len(ids)
    builder.finalize(str(tmp_path / "theirs_text_document.idx"))
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")
    assert summary.num_written == len(documents) and summary.num_tokens == {"text": num_tokens}


def test_workers_change_nothing(
    tmp_path: Path, tokenizer_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With batches so small that results come back out of order."""
    monkeypatch.setattr("megatron_ponder.data.preprocess.BATCH_BYTES", 300)
    corpus = corpora.write_json_lines(tmp_path / "c.jsonl", corpora.texts())
    for workers in (1, 3):
        prefix = tmp_path / str(workers)
        run_preprocess(corpus, prefix, tokenizer_model=tokenizer_model, workers=workers)
    assert files(tmp_path / "1") == files(tmp_path / "3")


def test_documents_without_tokens_are_left_out_and_counted(tmp_path: Path) -> None:
    corpus = corpora.write_json_lines(tmp_path / "c.jsonl", ["1 2", "", "  ", "3"])
    settings = {"tokenizer_type": "NullTokenizer", "vocab_size": 50}
    summary = run_preprocess(corpus, tmp_path / "out", **settings)
    assert (summary.num_read, summary.num_written, summary.num_empty) == (4, 2, 2)
    assert corpora.read_documents(f"{tmp_path}/out_text_document") == [[1, 2, 49], [3, 49]]
    run_preprocess(corpus, tmp_path / "bare", append_eod=False, **settings)
    assert corpora.read_documents(f"{tmp_path}/bare_text_document") == [[1, 2], [3]]


def test_a_dataset_for_each_key_and_wide_ids(tmp_path: Path) -> None:
    corpus = corpora.write_json_lines(
        tmp_path / "c.jsonl", [{"text": "70000 1", "note": "2"}, {"text": "3", "note": "4"}]
    )
    run_preprocess(
        corpus,
        tmp_path / "out",
        json_keys=("text", "note"),
        tokenizer_type="NullTokenizer",
        vocab_size=80_000,
    )
    for key, first in (("text", [70_000, 1, 79_999]), ("note", [2, 79_999])):
        prefix = f"{tmp_path}/out_{key}_document"
        assert check_indexed_dataset(prefix).num_documents == 2
        assert corpora.read_documents(prefix)[0] == first


def test_output_that_exists_stays_unless_replaced_on_purpose(tmp_path: Path) -> None:
    prefix = tmp_path / "out"
    settings = {"tokenizer_type": "NullTokenizer", "vocab_size": 50}
    first = corpora.write_json_lines(tmp_path / "a.jsonl", ["1 2 3"])
    second = corpora.write_json_lines(tmp_path / "b.jsonl", ["4"])
    run_preprocess(first, prefix, **settings)
    with pytest.raises(DataError, match="--overwrite"):
        run_preprocess(second, prefix, **settings)
    assert corpora.read_documents(f"{prefix}_text_document") == [[1, 2, 3, 49]]
    run_preprocess(second, prefix, overwrite=True, **settings)
    assert corpora.read_documents(f"{prefix}_text_document") == [[4, 49]]


@pytest.mark.parametrize("bad", ['{"text": 1}', '{"text": "99"}', ""])
def test_a_run_that_fails_leaves_nothing(bad: str, tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"text": "1 2"}\n' * 5 * bool(bad) + bad + "\n")
    with pytest.raises(DataError):
        run_preprocess(
            str(corpus), tmp_path / "out" / "x", tokenizer_type="NullTokenizer", vocab_size=50
        )
    assert list((tmp_path / "out").iterdir()) == []
