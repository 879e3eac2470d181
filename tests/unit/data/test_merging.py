"""Index files, written and joined: the bytes are those of megatron-core's builder."""

from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from megatron_ponder.data.encoding import token_dtype
from megatron_ponder.data.indexed import CODES, check_indexed_dataset
from megatron_ponder.data.merging import MergeConfig, merge_datasets
from megatron_ponder.errors import DataError
from tests.unit.data import corpora

Document = list[list[int]]
"""Sequences of a document."""


def by_megatron(prefix: Path, documents: list[Document], dtype: type[numpy.number]) -> str:
    """A dataset with several sequences per document."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        ids = torch.tensor([i for sequence in document for i in sequence])
        builder.add_document(ids, [len(sequence) for sequence in document])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def joined_by_megatron(output: Path, prefixes: list[str], dtype: type[numpy.number]) -> None:
    builder = IndexedDatasetBuilder(f"{output}.bin", dtype=dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gc.collect", lambda: 0)  # add_index's takes longer than all of the rest
        for prefix in prefixes:
            builder.add_index(prefix)
    builder.finalize(f"{output}.idx")


def content(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


DATASETS = st.lists(
    st.lists(
        st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=5), min_size=1, max_size=3),
        min_size=1,
        max_size=5,
    ),
    min_size=1,
    max_size=4,
)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    datasets=DATASETS,
    dtype=st.sampled_from(sorted(CODES, key=str)),
    piece_items=st.sampled_from([1, 2, 1 << 20]),
)
def test_joined_as_megatron_joins(
    datasets: list[list[Document]], dtype: type[numpy.number], piece_items: int, tmp_path: Path
) -> None:
    if dtype is numpy.int8:
        datasets = [[[[i // 2 for i in s] for s in d] for d in each] for each in datasets]
    prefixes = [by_megatron(tmp_path / str(i), d, dtype) for i, d in enumerate(datasets)]
    joined_by_megatron(tmp_path / "theirs", prefixes, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_ponder.data.indexed.PIECE_ITEMS", piece_items)
        merge_datasets(
            MergeConfig(input=tuple(prefixes), output_prefix=str(tmp_path / "ours"), overwrite=True)
        )
        size = check_indexed_dataset(str(tmp_path / "ours"))
    assert content(tmp_path / "ours") == content(tmp_path / "theirs")
    assert size.num_documents == sum(map(len, datasets))


@pytest.mark.parametrize("vocab_size", [10, 65499, 65500, 65536, 200_000])
def test_ids_are_as_wide_as_megatrons(vocab_size: int) -> None:
    assert token_dtype(vocab_size) is DType.optimal_dtype(vocab_size)


def test_codes_are_megatrons() -> None:
    assert {code: DType.code_from_dtype(dtype) for dtype, code in CODES.items()} == {
        code: code for code in CODES.values()
    }


def test_a_folder_and_what_is_refused(tmp_path: Path, tokenizer_model: str) -> None:
    def merge(*inputs: str, output: str = "all", **options: bool) -> None:
        merge_datasets(MergeConfig(input=inputs, output_prefix=str(tmp_path / output), **options))

    first = corpora.write_ids(tmp_path / "in" / "b", [[1], [2, 3]])
    second = corpora.write_ids(tmp_path / "in" / "a", [[4]])
    merge(str(tmp_path / "in"))
    assert corpora.read_documents(str(tmp_path / "all")) == [[4, 99], [1, 99], [2, 3, 99]]
    wide = corpora.write_ids(tmp_path / "wide", [[70_000]], vocab_size=80_000)
    other = corpora.write_ids(tmp_path / "other", [[1]], vocab_size=50)
    (tmp_path / "empty").mkdir()
    for inputs, message in (
        ((first, wide), "different tokenizers"),
        ((first, other), "another tokenizer"),
        ((first, str(tmp_path / "none")), "no such file"),
        ((str(tmp_path / "empty"),), "no dataset"),
        ((first, second), "exists already"),
    ):
        with pytest.raises(DataError, match=message):
            merge(*inputs, output="all" if "exists" in message else "fresh")
    with pytest.raises(DataError, match="is one of the inputs"):
        merge(first, output="in/b_text_document", overwrite=True)
    assert not list(tmp_path.glob("fresh*")) and not list(tmp_path.glob(".*"))
    merge(first, second, overwrite=True)
    assert corpora.read_documents(str(tmp_path / "all")) == [[1, 99], [2, 3, 99], [4, 99]]
