"""The corpus: all of a library's text, each file on one side of the split, the same every time."""

import json
import sysconfig
from pathlib import Path

import pytest
from corpus import documents, is_held_out, write_corpus

from megatron_ponder.errors import DataError

LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.slow
def test_this_pythons_library(tmp_path: Path) -> None:
    train, held_out = tmp_path / "a" / "train.jsonl", tmp_path / "a" / "held_out.jsonl"
    sizes = write_corpus(train, held_out, LIBRARY)
    parts = read(train), read(held_out)
    assert sizes["train_bytes"] > 5_000_000 and sizes["held_out_bytes"] > 200_000
    for name, part in zip(("train", "held_out"), parts, strict=True):
        assert len(part) == sizes[f"{name}_documents"]
        assert sum(len(d["text"].encode()) for d in part) == sizes[f"{name}_bytes"]
        assert {d["kind"] for d in part} == {"source", "prose"}
    assert not {d["source"] for d in parts[0]} & {d["source"] for d in parts[1]}
    assert all(is_held_out(d["source"]) for d in parts[1])
    assert any(d["source"] == "argparse.py" for part in parts for d in part)
    again = tmp_path / "b" / "train.jsonl"
    write_corpus(again, tmp_path / "b" / "held_out.jsonl", LIBRARY)
    assert again.read_bytes() == train.read_bytes()


def test_long_modules_are_cut_without_loss(tmp_path: Path) -> None:
    source = "".join(f'def f{i}():\n    """Number {i}."""\n    return {i}\n\n' for i in range(3000))
    (tmp_path / "long.py").write_text(source)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "x.py").write_text(source)
    (tmp_path / "broken.py").write_text("def f(:\n" * 100)
    found = list(documents(tmp_path))
    pieces = [d["text"] for d in found if d["kind"] == "source"]
    assert len(pieces) > 3 and "".join(pieces) == source
    (prose,) = [d["text"] for d in found if d["kind"] == "prose"]
    assert prose.startswith("Number 0.\n\nNumber 1.")
    assert {d["source"] for d in found} == {"long.py"}


def test_too_little_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="use a complete Python"):
        write_corpus(tmp_path / "a", tmp_path / "b", tmp_path)
    assert list(tmp_path.iterdir()) == []
