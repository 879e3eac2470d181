"""Compressed files give what went in, or say that they are damaged; never less in silence."""

import bz2
import gzip
import io
import lzma
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ponder.data import sources
from megatron_ponder.data.sources import STDIN, Source, find_inputs
from megatron_ponder.errors import DataError

COMPRESS = {
    ".gz": gzip.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
TEXT = b'{"text": "some words, and some more"}\n' * 20


def read(path: Path) -> bytes:
    return b"".join(Source(path).pieces())


def write(folder: Path, suffix: str, content: bytes) -> Path:
    path = folder / f"c.jsonl{suffix}"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", COMPRESS)
def test_one_stream_or_several(suffix: str, tmp_path: Path) -> None:
    compress = COMPRESS[suffix]
    assert read(write(tmp_path, suffix, compress(TEXT))) == TEXT
    several = compress(TEXT) + compress(b"") + compress(b"end")
    assert read(write(tmp_path, suffix, several)) == TEXT + b"end"
    path = write(tmp_path, suffix, compress(TEXT))
    assert Source(path).suffix == ".jsonl"


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_truncation_is_found(suffix: str, tmp_path: Path) -> None:
    content = COMPRESS[suffix](TEXT)
    for size in range(len(content)):
        with pytest.raises(DataError, match=f"c.jsonl{suffix}: "):
            read(write(tmp_path, suffix, content[:size]))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_something_else_behind_the_end_is_found(suffix: str, tmp_path: Path) -> None:
    for tail in (b"garbage that is no stream", TEXT):
        with pytest.raises(DataError, match="damaged|ends early"):
            read(write(tmp_path, suffix, COMPRESS[suffix](TEXT) + tail))
    with pytest.raises(DataError, match=f"its name says {suffix[1:]}, but"):
        read(write(tmp_path, suffix, TEXT))


def test_padding_behind_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gzip allows zeros at the end; xz a multiple of four, also between streams."""
    for piece_bytes in (1, 7, 1 << 20):
        monkeypatch.setattr(sources, "PIECE_BYTES", piece_bytes)
        assert read(write(tmp_path, ".gz", gzip.compress(TEXT) + b"\0" * 1000)) == TEXT
        stream = lzma.compress(TEXT)
        for padding in (0, 4, 8, 40):
            content = stream + bytes(padding) + stream + bytes(padding)
            assert read(write(tmp_path, ".xz", content)) == TEXT + TEXT
        for content in (stream + bytes(3) + stream, stream + bytes(5), bytes(4) + stream):
            with pytest.raises(DataError, match="c.jsonl.xz: "):
                read(write(tmp_path, ".xz", content))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_small_file_that_unpacks_to_much_comes_in_pieces(suffix: str, tmp_path: Path) -> None:
    size = 50 << 20
    path = write(tmp_path, suffix, COMPRESS[suffix](bytes(size)))
    lengths = [len(piece) for piece in Source(path).pieces()]
    assert sum(lengths) == size and max(lengths) <= sources.PIECE_BYTES


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_a_changed_byte_is_found_or_changes_nothing(tmp_path: Path, data: st.DataObject) -> None:
    """Some bytes of headers (a file's name, a time) mean nothing. pyarrow writes no checksum."""
    suffix = data.draw(st.sampled_from(sorted(COMPRESS.keys() - {".zst"})))
    content = bytearray(COMPRESS[suffix](TEXT))
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        assert read(write(tmp_path, suffix, bytes(content))) == TEXT
    except DataError:
        pass


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=st.binary(max_size=5000), suffix=st.sampled_from(sorted(COMPRESS)))
def test_any_bytes_come_back(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path, suffix, COMPRESS[suffix](content))
    assert read(path) == content
    source = Source(path)
    source.hash_all()
    assert source.num_bytes == path.stat().st_size


def test_standard_input_may_be_compressed(monkeypatch: pytest.MonkeyPatch) -> None:
    for content in (TEXT, *(compress(TEXT) for compress in COMPRESS.values()), b""):
        buffer = io.BytesIO(content)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(buffer))
        expected = TEXT if content else b""
        assert read(STDIN) == expected
    assert find_inputs(["-"]) == [STDIN] and sources.total_bytes([STDIN]) is None
    with pytest.raises(DataError, match="once only"):
        find_inputs(["-", "-"])


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path)
