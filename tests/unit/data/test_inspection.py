"""Numbers of a dataset, its documents as text, and damage that only reading everything finds."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ponder.data.inspection import InspectConfig, inspect_dataset
from megatron_ponder.data.merging import MergeConfig, merge_datasets
from megatron_ponder.errors import DataError
from tests.unit.data import corpora

TEXTS = ["one two", "three\n", "and a longer text of several words"]


@pytest.fixture
def prefix(tmp_path: Path, tokenizer_model: str) -> str:
    corpus = corpora.write_json_lines(tmp_path / "c.jsonl", TEXTS)
    corpora.run_preprocess(corpus, tmp_path / "my_data", tokenizer_model=tokenizer_model)
    return f"{tmp_path}/my_data_text_document"


def inspect(prefix: str, **options: Any) -> dict[str, Any]:
    return inspect_dataset(InspectConfig(data_path=prefix, **options))


def test_numbers(prefix: str, tokenizer_model: str) -> None:
    found = inspect(prefix)
    lengths = [len(corpora.encode(tokenizer_model, text)) + 1 for text in TEXTS]
    assert (found["documents"], found["tokens"]) == (3, sum(lengths))
    told = found["tokens_per_document"]
    assert (told["least"], told["most"]) == (min(lengths), max(lengths))
    assert told["mean"] == pytest.approx(sum(lengths) / 3)
    assert told["p50"] == sorted(lengths)[1]
    assert found["manifest"].endswith("my_data.manifest.json")


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    corpora.write_sequences(tmp_path / "d", [[[1], [2, 3]], [[4]], [[5, 6], [7, 9]]])
    null = {"tokenizer_type": "NullTokenizer", "vocab_size": 10}
    found = inspect(f"{tmp_path}/d", document=2, verify=True, **null)
    assert (found["documents"], found["sequences"]) == (3, 5)
    assert found["tokens_per_document"]["most"] == 4
    assert found["document"] == {"number": 2, "tokens": 4, "is_ended": True, "text": "5 6 7"}
    assert inspect(f"{tmp_path}/d", document=1, **null)["document"]["text"] == "4"
    assert found["verified"]["largest_id"] == 9


@pytest.mark.parametrize("empty", [[], [[]]], ids=["no sequence", "an empty one"])
def test_documents_that_are_empty(empty: list[list[int]], tmp_path: Path) -> None:
    documents = [empty, [[1, 9]], empty, [[2, 9]], empty]
    null = {"tokenizer_type": "NullTokenizer", "vocab_size": 10}
    for name in "ab":
        corpora.write_sequences(tmp_path / name, documents)
    inputs = (f"{tmp_path}/a", f"{tmp_path}/b")
    merge_datasets(MergeConfig(input=inputs, output_prefix=f"{tmp_path}/c"))
    for number, expected in enumerate(["", "1", "", "2", ""] * 2):
        found = inspect(f"{tmp_path}/c", document=number, verify=True, **null)
        assert found["document"]["text"] == expected
        assert (found["documents"], found["tokens"]) == (10, 8)
    corpora.write_sequences(tmp_path / "none", [empty, empty])
    with pytest.raises(DataError, match="the dataset is empty"):
        inspect(f"{tmp_path}/none")


def test_documents_as_text(prefix: str, tokenizer_model: str) -> None:
    for number, text in enumerate(TEXTS):
        document = inspect(prefix, document=number, tokenizer_model=tokenizer_model)["document"]
        assert document["text"] == text and document["is_ended"]
    with pytest.raises(DataError, match="documents 0 to 2"):
        inspect(prefix, document=3, tokenizer_model=tokenizer_model)
    with pytest.raises(DataError, match="--tokenizer-model"):
        inspect(prefix, document=0)


def test_verification(prefix: str, tokenizer_model: str, tmp_path: Path) -> None:
    for options in ({}, {"tokenizer_model": tokenizer_model}):
        verified = inspect(prefix, verify=True, **options)["verified"]
        assert verified["manifest"] and verified["vocab_size"] == corpora.VOCAB_SIZE
    merged = str(tmp_path / "merged")
    merge_datasets(MergeConfig(input=(prefix, prefix), output_prefix=merged))
    assert inspect(merged, verify=True)["verified"]["manifest"]

    data = Path(f"{prefix}.bin")
    content = data.read_bytes()
    data.write_bytes(content[:-2] + b"\3\0")
    with pytest.raises(DataError, match="SHA-256 differs"):
        inspect(prefix, verify=True)
    data.write_bytes(content[:-2] + b"\xff\xff")
    with pytest.raises(DataError, match="ids from 2 to 65535, but the vocabulary ends at 319"):
        inspect(prefix, verify=True)
    data.write_bytes(content)
    with pytest.raises(DataError, match="the vocabulary ends at 9"):
        inspect(prefix, verify=True, vocab_size=10)
    largest = inspect(prefix, verify=True)["verified"]["largest_id"]
    with pytest.raises(DataError, match=f"the vocabulary ends at {largest - 1}"):
        inspect(prefix, verify=True, vocab_size=largest)
    assert inspect(prefix, verify=True, vocab_size=largest + 1)
    with pytest.raises(DataError, match="another tokenizer"):
        inspect(prefix, verify=True, tokenizer_type="NullTokenizer", vocab_size=320)
    Path(tmp_path / "my_data.manifest.json").write_text("{")
    with pytest.raises(DataError, match="no manifest"):
        inspect(prefix)


def test_the_picture(prefix: str, tmp_path: Path) -> None:
    picture = tmp_path / "pictures" / "lengths.png"
    assert json.dumps(inspect(prefix, histogram=str(picture)))
    assert picture.read_bytes().startswith(b"\x89PNG")
