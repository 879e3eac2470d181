"""No damage to a dataset's files gets past the checks, except other ids of the same kind."""

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ponder.data.indexed import HEADER, check_indexed_dataset
from megatron_ponder.errors import DataError
from tests.unit.data import corpora

DOCUMENTS = [[1, 2, 3], [4], [5, 6]]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return corpora.write_ids(tmp_path_factory.mktemp("indexed") / "data", DOCUMENTS)


def damaged(prefix: str, folder: Path) -> Path:
    """A copy that a test may change; its path without suffix."""
    for suffix in (".bin", ".idx"):
        shutil.copy(prefix + suffix, folder / ("copy" + suffix))
    return folder / "copy"


def test_a_whole_dataset(prefix: str) -> None:
    size = check_indexed_dataset(prefix)
    assert (size.num_documents, size.num_tokens) == (3, 9)
    assert corpora.read_documents(prefix) == [[1, 2, 3, 99], [4, 99], [5, 6, 99]]


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("size", [None, 0, 1, 17, -1, +1])
def test_missing_truncated_and_longer_files(
    prefix: str, suffix: str, size: int | None, tmp_path: Path
) -> None:
    copy = damaged(prefix, tmp_path)
    file = copy.with_suffix(suffix)
    content = file.read_bytes()
    if size is None:
        file.unlink()
    elif size == 1:
        file.write_bytes(content + b"\0")
    else:
        file.write_bytes(content[:size])
    with pytest.raises(DataError, match="copy"):
        check_indexed_dataset(str(copy))


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_any_changed_byte_of_the_index_is_found(
    prefix: str, tmp_path: Path, data: st.DataObject
) -> None:
    """Only the dtype code can become another valid one, of the same width."""
    copy = damaged(prefix, tmp_path)
    index = copy.with_suffix(".idx")
    content = bytearray(index.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda v: v != content[place]))
    content[place] = value
    index.write_bytes(bytes(content))
    code_place = HEADER.size - 8 - 8 - 1
    boundaries = len(content) - 8 * (len(DOCUMENTS) + 1)
    if place == code_place and value == 3:
        return
    if boundaries <= place:
        # Other boundaries between documents may still be in order; the ids are the same.
        try:
            assert check_indexed_dataset(str(copy)).num_tokens == 9
        except DataError:
            pass
        return
    with pytest.raises(DataError):
        check_indexed_dataset(str(copy))
