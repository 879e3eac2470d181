"""A corpus becomes exactly the files that megatron-core's own builder writes, or nothing."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_ponder.data.indexed import check_indexed_dataset
from megatron_ponder.data.work_folder import opened
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
    assert summary.num_written == len(documents) and summary.num_tokens == {
        "text_document": num_tokens
    }


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that results come back out of order."""
    monkeypatch.setattr("megatron_ponder.data.preprocess.MIN_CHUNK_BYTES", 64)
    monkeypatch.setattr("megatron_ponder.data.sources.PIECE_BYTES", 64)


def test_workers_change_nothing(tmp_path: Path, tokenizer_model: str, small_chunks: None) -> None:
    corpus = corpora.write_json_lines(tmp_path / "c.jsonl", corpora.texts())
    for workers in (0, 1, 3):
        prefix = tmp_path / str(workers) / "out"
        summary = run_preprocess(corpus, prefix, tokenizer_model=tokenizer_model, workers=workers)
        assert summary.num_chunks > 20
    alone = files(tmp_path / "0" / "out"), manifest(tmp_path / "0" / "out")
    for workers in (1, 3):
        other = tmp_path / str(workers) / "out"
        assert (files(other), manifest(other)) == alone


def test_documents_without_tokens_are_left_out_and_counted(tmp_path: Path) -> None:
    corpus = corpora.write_json_lines(tmp_path / "c.jsonl", ["1 2", "", "  ", "3"])
    settings = {"tokenizer_type": "NullTokenizer", "vocab_size": 50}
    summary = run_preprocess(corpus, tmp_path / "out", max_rejected=2, **settings)
    assert (summary.num_read, summary.num_written) == (4, 2)
    assert summary.rejected == {"empty": 2}
    assert corpora.read_documents(f"{tmp_path}/out_text_document") == [[1, 2, 49], [3, 49]]
    run_preprocess(corpus, tmp_path / "bare", append_eod=False, max_rejected=2, **settings)
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
def test_a_run_that_fails_leaves_no_output(bad: str, tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text('{"text": "1 2"}\n' * 5 * bool(bad) + bad + "\n")
    with pytest.raises(DataError):
        run_preprocess(str(corpus), tmp_path / "out" / "x", **IDS)
    assert not list((tmp_path / "out").glob("x*"))


IDS = {"tokenizer_type": "NullTokenizer", "vocab_size": 50}
FAULTS = {
    b"\xff": "invalid_utf8",
    b'{"text": "1': "broken_json",
    b"7": "not_an_object",
    b'{"body": "1"}': "missing_text",
    b'{"text": null}': "missing_text",
    b'{"text": 7}': "not_a_string",
    b'{"text": "\\udfff"}': "lone_surrogate",
    b'{"text": " "}': "empty",
    b'{"text": "50"}': "not_tokenized",
    b'{"text": "' + b"1 " * 60 + b'"}': "too_long",
}


def write_lines(path: Path, lines: Sequence[bytes]) -> str:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def rejected(prefix: Path) -> list[dict[str, Any]]:
    file = Path(f"{prefix}.rejected.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def manifest(prefix: Path) -> dict[str, Any]:
    return json.loads(Path(f"{prefix}.manifest.json").read_text())


@pytest.mark.parametrize("workers", [0, 2])
def test_read_is_written_plus_rejected_each_with_its_place(
    workers: int, tmp_path: Path, small_chunks: None
) -> None:
    good = [b'{"text": "%d"}' % i for i in range(49)]
    lines = [line for pair in zip(good, [*FAULTS, *[b""] * 39], strict=True) for line in pair]
    corpus = write_lines(tmp_path / "c.jsonl", lines)
    prefix = tmp_path / "out"
    summary = run_preprocess(
        corpus, prefix, max_rejected=10, max_document_bytes=100, workers=workers, **IDS
    )
    assert summary.num_read == 59 == summary.num_written + summary.num_rejected
    assert corpora.read_documents(f"{prefix}_text_document") == [[i, 49] for i in range(49)]
    found = [(each["line"], each["kind"]) for each in rejected(prefix)]
    assert found == [(2 * i + 2, kind) for i, kind in enumerate(FAULTS.values())]
    assert {each["file"] for each in rejected(prefix)} == {corpus}
    documents = manifest(prefix)["documents"]
    assert documents["read"] == 59 and documents["written"] == 49
    assert documents["rejected"] == dict(sorted(Counter(FAULTS.values()).items()))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_key_that_is_stated_twice_is_counted_and_said(
    workers: int, tmp_path: Path, small_chunks: None, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [
        b'{"text": "1", "other": {"a": 1, "a": 2}}',
        b'{"text": "7", "text": "2"}',
        b'{"kind": "text", "text": "3"}',
        b'{"te\\u0078t": "8", "text": "4"}',
        b'{"text": "5", "text": ',
    ]
    corpus = write_lines(tmp_path / "c.jsonl", lines)
    prefix = tmp_path / "out"
    summary = run_preprocess(corpus, prefix, workers=workers, max_rejected=1, **IDS)
    assert corpora.read_documents(f"{prefix}_text_document") == [[i, 49] for i in (1, 2, 3, 4)]
    assert summary.num_repeated_keys == 2 == manifest(prefix)["documents"]["repeated_keys"]
    assert f"2 documents state a key twice in one object, the first at {corpus}:2" in caplog.text


def test_one_too_many_stops_the_run_and_shows_the_first(tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "c.jsonl", [b'{"text": "1"}', *FAULTS])
    with pytest.raises(DataError, match="--max-rejected 9") as error:
        run_preprocess(corpus, tmp_path / "out", max_rejected=9, max_document_bytes=100, **IDS)
    message = str(error.value)
    assert f"{corpus}:2: not valid UTF-8" in message and f"{corpus}:6: " in message
    assert f"{corpus}:7: " not in message and "2 missing_text" in message
    run_preprocess(corpus, tmp_path / "out", max_rejected=10, max_document_bytes=100, **IDS)


def test_a_document_with_a_fault_under_one_key_is_in_no_dataset(tmp_path: Path) -> None:
    records = [{"text": "1", "note": "2"}, {"text": "3"}, {"text": "4", "note": "5"}]
    corpus = corpora.write_json_lines(tmp_path / "c.jsonl", records)
    prefix = tmp_path / "out"
    run_preprocess(corpus, prefix, json_keys=("text", "note"), max_rejected=1, **IDS)
    assert corpora.read_documents(f"{prefix}_text_document") == [[1, 49], [4, 49]]
    assert corpora.read_documents(f"{prefix}_note_document") == [[2, 49], [5, 49]]


def test_the_manifest_tells_input_tokenizer_and_files(tmp_path: Path) -> None:
    corpus = corpora.write_json_lines(tmp_path / "c.jsonl", ["1 2", "3"])
    prefix = tmp_path / "out"
    run_preprocess(corpus, prefix, **IDS)
    content = Path(corpus).read_bytes()
    told = manifest(prefix)
    assert told["inputs"] == [
        {"path": corpus, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    ]
    assert told["tokenizer"]["class"] == "NullTokenizer" and told["tokenizer"]["eod"] == 49
    entry = told["datasets"]["out_text_document"]
    for suffix in ("bin", "idx"):
        written = Path(f"{prefix}_text_document.{suffix}").read_bytes()
        assert entry[f"{suffix}_sha256"] == hashlib.sha256(written).hexdigest()
        assert entry[f"{suffix}_bytes"] == len(written)
    assert (entry["documents"], entry["tokens"], entry["dtype"]) == (2, 5, "uint16")


def test_shards_are_used_again_only_for_the_same_content_and_options(
    tmp_path: Path, small_chunks: None
) -> None:
    """A run that stopped at a fault in the last line; then the line is put right."""
    lines = [b'{"text": "%d"}' % i for i in range(40)]
    corpus = write_lines(tmp_path / "c.jsonl", [*lines, b"x" * 13])

    def stop(**settings: Any) -> None:
        with pytest.raises(DataError, match="--max-rejected"):
            run_preprocess(corpus, tmp_path / "out", **IDS, **settings)

    stop(append_eod=False)
    stop()
    lines[20] = b'{"text": "7"} '
    write_lines(tmp_path / "c.jsonl", [*lines[:-1], b'{"text": "1"}', b"x" * 12])
    summary = run_preprocess(corpus, tmp_path / "out", max_rejected=1, **IDS)
    assert summary.num_written == 40
    assert summary.num_chunks > 5 and summary.num_reused == summary.num_chunks - 2
    expected = [[i, 49] for i in range(40)]
    expected[20], expected[39] = [7, 49], [1, 49]
    assert corpora.read_documents(f"{tmp_path}/out_text_document") == expected


def test_a_damaged_shard_is_made_again(tmp_path: Path, small_chunks: None) -> None:
    lines = [b'{"text": "%d"}' % i for i in range(40)]
    corpus = write_lines(tmp_path / "c.jsonl", [*lines, b"x"])
    prefix = tmp_path / "out"
    with pytest.raises(DataError, match="--max-rejected"):
        run_preprocess(corpus, prefix, **IDS)
    shards = sorted((tmp_path / ".out.partial").glob("*.shard"))
    assert len(shards) > 5
    damages = (lambda c: c[:-1], lambda c: c[:-2] + b"zz", lambda c: b"", lambda c: c[:30])
    for shard, damage in zip(shards[:4], damages, strict=True):
        shard.write_bytes(damage(shard.read_bytes()))
    summary = run_preprocess(corpus, prefix, max_rejected=1, **IDS)
    assert summary.num_reused == summary.num_chunks - 4
    assert corpora.read_documents(f"{prefix}_text_document") == [[i, 49] for i in range(40)]
    assert not (tmp_path / ".out.partial").exists()


def test_two_runs_at_once_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_ponder.data.work_folder.LOCK_TIMEOUT_S", 0.2)
    corpus = corpora.write_json_lines(tmp_path / "c.jsonl", ["1"])
    with opened(tmp_path / "out"):
        with pytest.raises(DataError, match="another run is writing"):
            run_preprocess(corpus, tmp_path / "out", **IDS)
    run_preprocess(corpus, tmp_path / "out", **IDS)


def test_nothing_but_rejected_documents(tmp_path: Path) -> None:
    corpus = write_lines(tmp_path / "c.jsonl", list(FAULTS))
    with pytest.raises(DataError, match="no document with any text"):
        run_preprocess(corpus, tmp_path / "out", max_rejected=99, max_document_bytes=100, **IDS)
