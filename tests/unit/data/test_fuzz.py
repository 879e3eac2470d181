"""Damaged corpora and datasets are read or refused, never a traceback, a hang or a giant buffer."""

import bz2
import dataclasses
import gzip
import json
import lzma
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_ponder.data.conversations import ConversationEncoder
from megatron_ponder.data.documents import DocumentError, RawDocument
from megatron_ponder.data.indexed import check_indexed_dataset
from megatron_ponder.data.inspection import InspectConfig, inspect_dataset
from megatron_ponder.data.instruction_dataset import check_kind
from megatron_ponder.data.manifest import check_tokenizer, text_bytes
from megatron_ponder.data.readers import ReadOptions, read_segments
from megatron_ponder.data.sources import Source
from megatron_ponder.data.tokenizers import NullTokenizer
from tests.fuzz import damaged_bytes, damaged_file, damaged_value, survive
from tests.unit.data import corpora

pytestmark = pytest.mark.slow
KEYS = ("text", "title")
LINES = b"".join(
    json.dumps({"text": text, "title": f"number {n}", "score": n / 3}).encode() + b"\n"
    for n, text in enumerate((*corpora.HARD_TEXTS, *corpora.texts(5)))
)
COMPRESS = {
    "": lambda content: content,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
}


def read(path: Path) -> None:
    """Every document as preprocessing takes it: its texts, or the reason for its rejection."""
    for segment in read_segments(Source(path), ReadOptions(keys=KEYS)):
        for document in segment.documents(1 << 20):
            if isinstance(document, DocumentError):
                continue
            try:
                document.texts(KEYS)
            except DocumentError as error:
                assert error.reason and json.dumps(error.as_record())


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_lines(suffix: str, tmp_path: Path) -> None:
    content = COMPRESS[suffix](LINES)
    path = tmp_path / f"c.jsonl{suffix}"
    found = survive(read, lambda draw: damaged_file(content, path, draw), seed=1)
    assert found["refused"] > 100 or not suffix


def tables() -> dict[str, pyarrow.Table]:
    texts = [*corpora.HARD_TEXTS, None, *corpora.texts(30)]
    plain = pyarrow.array(texts)
    return {
        "plain": pyarrow.table({"text": plain, "title": pyarrow.array(range(len(texts)))}),
        "dictionary": pyarrow.table({"text": plain.dictionary_encode(), "title": plain}),
        "nested": pyarrow.table({"text": plain, "title": [[text] for text in texts]}),
    }


@pytest.mark.parametrize("kind", tables())
@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_parquet(kind: str, compression: str, tmp_path: Path) -> None:
    path = tmp_path / "c.parquet"
    pyarrow.parquet.write_table(
        tables()[kind], path, compression=compression, row_group_size=10, data_page_version="2.0"
    )
    content = path.read_bytes()
    found = survive(read, lambda draw: damaged_file(content, path, draw), seed=2)
    assert found["refused"] > 100


@pytest.mark.parametrize("damage", ["bytes", "values"])
def test_manifests(damage: str, tmp_path: Path) -> None:
    prefix = corpora.write_ids(tmp_path / "data", [[1, 2, 3], [4]])
    path = tmp_path / "data.manifest.json"
    text = path.read_bytes()
    tokenizer = NullTokenizer(100)
    config = InspectConfig(data_path=prefix, verify=True)

    def use(content: object) -> None:
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        text_bytes(prefix)
        check_kind(prefix, instruction_data=False)
        inspect_dataset(config)
        check_tokenizer(prefix, tokenizer)

    if damage == "bytes":
        found = survive(use, lambda draw: damaged_bytes(text, draw), seed=4)
    else:
        value = json.loads(text)
        found = survive(use, lambda draw: damaged_value(value, draw), seed=5)
    assert found["refused"] > 100


def test_conversations(tmp_path: Path) -> None:
    records = [
        {
            "messages": [
                {"role": r, "content": f"{r} says"} for r in ("system", "user", "assistant")
            ]
        },
        {"prompt": "1 2", "response": "3"},
    ]
    encoder = ConversationEncoder(NullTokenizer(100))

    def encode(value: object) -> None:
        content = json.dumps(value).encode()
        document = RawDocument(content, True, "c.jsonl", 1)
        encoder.encode([document])
        document.repeats_key(encoder.keys)

    for record in records:
        survive(encode, lambda draw, record=record: damaged_value(record, draw), seed=6)


@pytest.mark.parametrize("suffix", [".idx", ".bin"])
def test_indexed_datasets(suffix: str, tmp_path: Path) -> None:
    prefix = corpora.write_ids(tmp_path / "data", [[1, 2, 3], [4], [5, 6], *[[7, 8]] * 9])
    path = Path(prefix + suffix)
    content = path.read_bytes()

    config = InspectConfig(data_path=prefix, tokenizer_type="NullTokenizer", vocab_size=100)

    def inspect(_: Path) -> None:
        check_indexed_dataset(prefix)
        for document in range(12):
            inspect_dataset(dataclasses.replace(config, document=document))

    found = survive(inspect, lambda draw: damaged_file(content, path, draw), seed=3)
    assert found["refused"] > 100
