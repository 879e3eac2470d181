"""A path that names no dataset: what it names instead, and what is there."""

from pathlib import Path

import pytest

from megatron_ponder.data.indexed import check_indexed_dataset
from megatron_ponder.errors import DataError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "empty").mkdir()
    for name in ("corpus", *(f"part_{i}" for i in range(7))):
        for suffix in (".bin", ".idx"):
            (tmp_path / "data" / f"{name}_text_document{suffix}").touch()
    (tmp_path / "data" / "half_text_document.idx").touch()
    (tmp_path / "corpus.jsonl.zst").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("data/corpus", ["data/corpus.idx: no such file", "folder: data/corpus_text_document, "]),
        ("data/corpus_text_documnt", ["folder: data/corpus_text_document, ", " and 3 more."]),
        ("data/half_text_document", ["data/half_text_document.bin: no such file"]),
        ("data", ["data.idx: no such file", "data/part_"]),
        ("data/corpus_text_document.bin", ["the prefix of the dataset, data/corpus_text_document"]),
        ("empty/corpus", ["There is none in empty."]),
        ("nowhere/corpus", ["there is no folder nowhere"]),
        (
            "corpus.jsonl.zst",
            [
                "tools/preprocess_data.py --input corpus.jsonl.zst --output-prefix corpus ",
                "Then the dataset is corpus_text_document.",
            ],
        ),
    ],
)
def test_what_is_said(given: str, parts: list[str], folder: Path) -> None:
    with pytest.raises(DataError) as error:
        check_indexed_dataset(given)
    for part in parts:
        assert part in str(error.value)
    assert "half" not in str(error.value) or "half" in given
