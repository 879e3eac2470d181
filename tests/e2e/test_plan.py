"""tools/plan.py as a user calls it: whole reports, pictures, and refusals."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.commands import ROOT, run_forked, run_fresh

RECIPE = str(ROOT / "examples/llama/ponderlm2-1.4b.yaml")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return run_forked("tools/plan.py", *arguments)


def test_thousands_of_ranks(tmp_path: Path) -> None:
    """A recipe on 2048 ranks, without torchrun, data or tokenizer."""
    picture = tmp_path / "folder" / "step.png"
    layout = "--world-size 2048 --pipeline-model-parallel-size 8 --tensor-model-parallel-size 4"
    batch = "--sequence-parallel --global-batch-size 1024 --micro-batch-size 1"
    ended = run(
        *("--config", RECIPE, *layout.split(), *batch.split()),
        *("--json", "--device-memory-gib", "78", "--timeline", str(picture)),
    )
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["ranks"]["data_parallel"] == 64
    assert len(result["memory"]) == 8 == len(result["sent_bytes"])
    assert result["parameters"]["total"] == pytest.approx(1420.4e6, rel=1e-3)
    assert result["fits"] is True and result["remedies"] == []
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_text() -> None:
    arguments = ("--config", RECIPE, "--world-size", "8", "--device-memory-gib", "40")
    ended = run_fresh("tools/plan.py", *arguments)
    assert ended.returncode == 0, ended.stderr
    for words in ("8 ranks", "passes of a forward", "memory of a rank", "bubble", "DOES NOT FIT"):
        assert words in ended.stdout


def test_help_teaches() -> None:
    ended = run_fresh("tools/plan.py", "--help")
    assert ended.returncode == 0
    assert "--world-size INT" in ended.stdout and "--device-memory-gib" in ended.stdout
    ended = run("scaling", "--help")
    assert ended.returncode == 0
    assert "--global-batch-size 1024 \\\n" in ended.stdout and "--world-sizes" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", RECIPE], "--world-size is missing"),
        (["--config", RECIPE, "--world-size", "0"], "--world-size 0: must be at least 1"),
        (["--config", "nowhere.yaml", "--world-size", "1"], "nowhere.yaml: cannot be read"),
        (["--world-size", "1"], "--vocab-size must be given"),
        (["--world-size", "1", "--num-layer", "2"], "num-layers"),
        (["--preset", "gpt2", "--world-size", "6", "--tensor-model-parallel-size", "4"], "4"),
        (["--preset", "gpt2", "--world-size", "1", "--device-memory-gib", "0"], "must be above 0"),
        (
            "--preset gpt2 --world-size 2 --pipeline-model-parallel-size 2 --seq-length 64 "
            "--global-batch-size 3".split(),
            "micro-batches",
        ),
        (
            ["--preset", "gpt2", "--seq-length", "64", "--world-size", "1", "--method", "x"],
            "ponder",
        ),
    ],
)
def test_bad_input(arguments: list[str], message: str) -> None:
    ended = run(*arguments)
    assert ended.returncode == 2, ended.stdout
    assert message in ended.stderr and "Traceback" not in ended.stderr


def test_scaling(tmp_path: Path) -> None:
    """A whole search: numbers, tables and a picture."""
    picture = tmp_path / "folder" / "scaling.png"
    arguments = (
        "scaling --preset llama-410m --bf16 --global-batch-size 256 --world-sizes 8 1024 "
        "--largest-micro-batch-size 1"
    ).split()
    ended = run(*arguments, "--json", "--picture", str(picture))
    assert ended.returncode == 0, ended.stderr
    result = json.loads(ended.stdout)
    assert result["predicted"] is True and result["assumed"]["assumed_tflops"] == 400
    few, many = result["rows"]
    assert (few["world_size"], many["world_size"]) == (8, 1024)
    assert many["layout"]["data_parallel"] <= 256 and few["ours"]["fits"]
    # Nine times the layers, attention more than that over twice the slots, and one output layer.
    assert 8 < few["ours"]["step_s"] / few["compared"]["step_s"] < 10
    assert picture.read_bytes().startswith(b"\x89PNG")
    ended = run(*arguments)
    assert ended.returncode == 0, ended.stderr
    assert "PREDICTED" in ended.stdout and "best layouts" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "gpt2", "--seq-length", "64"], "--global-batch-size"),
        (["--preset", "gpt2", "--world-sizes", "0"], "--world-sizes"),
        (["--preset", "gpt2", "--link-efficiency", "2"], "--link-efficiency"),
        (["--global-batch-size", "8"], "--vocab-size must be given"),
    ],
)
def test_bad_input_of_scaling(arguments: list[str], message: str) -> None:
    ended = run("scaling", *arguments)
    assert ended.returncode == 2, ended.stdout
    assert message in ended.stderr and "Traceback" not in ended.stderr
