"""merge_datasets, inspect_data and prepare_index as commands; the run finds what was prepared."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.commands import run_forked, run_fresh
from tests.e2e import launch
from tests.e2e.launch import flags, run_main


def run(tool: str, *arguments: object) -> subprocess.CompletedProcess:
    return run_forked(f"tools/{tool}", *arguments)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> str:
    return launch.write_dataset(tmp_path_factory.mktemp("tools"))


def test_merge_and_inspect(prefix: str, tmp_path: Path) -> None:
    both = tmp_path / "both"
    merged = run("merge_datasets.py", "--input", prefix, prefix, "--output-prefix", both)
    assert merged.returncode == 0, merged.stderr
    assert merged.stdout.startswith(f"{both}: 120 documents, ")
    null = ["--tokenizer-type", "NullTokenizer", "--vocab-size", launch.VOCAB_SIZE]
    ended = run("inspect_data.py", "--data-path", both, "--verify", "--json", *null)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["verified"]["manifest"]
    ended = run("inspect_data.py", "--data-path", both, "--document", 60, *null)
    assert ended.returncode == 0 and "documents: 120" in ended.stdout
    assert "document 60: " in ended.stdout and "tokens, with an end id" in ended.stdout


def test_indexes_are_ready_when_the_run_starts(prefix: str, tmp_path: Path) -> None:
    settings = {
        "data_path": prefix,
        "data_cache_path": tmp_path / "cache",
        "train_iters": 2,
        "lr_warmup_iters": 0,
    }
    ended = run_fresh("tools/prepare_index.py", "--world-size", 1, *flags(**settings))
    assert ended.returncode == 0, ended.stderr
    assert "train: " in ended.stdout and "valid: " in ended.stdout
    (folder,) = (tmp_path / "cache").iterdir()
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    code, _, err = run_main(flags(**settings))
    assert code == 0, err
    assert list((tmp_path / "cache").iterdir()) == [folder]
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("tool", "arguments", "expected"),
    [
        ("merge_datasets.py", ["--input", "no", "--output-prefix", "x"], "no.idx: no such file"),
        ("inspect_data.py", ["--data-path", "no"], "no.idx: no such file"),
        ("prepare_index.py", ["--data-path", "no", *flags(train_iters=9)], "no.idx: no such file"),
        ("prepare_index.py", ["--world-size", 0, *flags(train_iters=1)], "--world-size 0"),
        ("prepare_index.py", ["--world-siz", 1, *flags(train_iters=1)], "world-siz"),
    ],
)
def test_bad_input(tool: str, arguments: list[object], expected: str) -> None:
    ended = run(tool, *arguments)
    assert ended.returncode == 2, ended.stderr
    assert expected in ended.stderr and "Traceback" not in ended.stderr
