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

from megatron_ponder.data.documents import DocumentError
from megatron_ponder.data.indexed import check_indexed_dataset
from megatron_ponder.data.inspection import InspectConfig, inspect_dataset
from megatron_ponder.data.readers import ReadOptions, read_segments
from megatron_ponder.data.sources import Source
from tests.fuzz import damaged_file, survive
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
