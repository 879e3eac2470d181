"""tools/preprocess_data.py as users meet it: killed, piped to, interrupted, given damaged input."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_ponder.data.sentencepiece_training import (
    TokenizerTrainingConfig,
    train_sentencepiece,
)
from tests.e2e.launch import ROOT
from tests.unit.data import corpora

TIMEOUT_S = 120
OUTPUTS = ("_text_document.bin", "_text_document.idx", ".manifest.json", ".rejected.jsonl")


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools/preprocess_data.py"), *map(str, arguments)]


def run(*arguments: object, stdin: bytes | None = None) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(*arguments),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        input=stdin,
        capture_output=True,
        timeout=TIMEOUT_S,
    )


def outputs(folder: Path) -> dict[str, bytes]:
    return {name: (folder / f"out{name}").read_bytes() for name in OUTPUTS}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 6 MB of JSON Lines, compressed, with a broken line here and there."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.jsonl.gz"
    documents = corpora.texts(400)
    draw = random.Random(1)
    with gzip.open(path, "wt", compresslevel=1) as file:
        for number in range(12_000):
            text = draw.choice(documents)
            file.write("{broken\n" if number % 3000 == 7 else json.dumps({"text": text}) + "\n")
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    lines = corpora.write_json_lines(folder / "c.jsonl", corpora.texts())
    output = str(folder / "t.model")
    train_sentencepiece(TokenizerTrainingConfig(input=(lines,), output=output, vocab_size=300))
    return output


@pytest.mark.parametrize(
    "num_kills", [3, pytest.param(20, marks=pytest.mark.slow)], ids=["quick", "slow"]
)
def test_killed_at_random_moments_and_started_again(
    num_kills: int, corpus: Path, tokenizer: str, tmp_path: Path
) -> None:
    """The main process is killed, its workers left behind; the end is that of a run in peace."""
    settings = ["--input", corpus, "--tokenizer-model", tokenizer, "--append-eod"]
    settings += ["--max-rejected", 4, "--workers", 2]
    (tmp_path / "peace").mkdir()
    start_s = time.monotonic()
    undisturbed = run(*settings, "--output-prefix", tmp_path / "peace/out")
    duration_s = time.monotonic() - start_s
    assert undisturbed.returncode == 0, undisturbed.stderr.decode()
    expected = outputs(tmp_path / "peace")

    draw = random.Random(num_kills)
    folder = tmp_path / "0"
    num_killed = num_reused = 0
    deadline = time.monotonic() + 3 * TIMEOUT_S
    # On a busy machine the first kills may come before there is anything to resume from.
    while num_killed < num_kills or (num_reused == 0 and time.monotonic() < deadline):
        folder = tmp_path / str(num_killed // 5)
        folder.mkdir(exist_ok=True)
        process = subprocess.Popen(
            command(*settings, "--output-prefix", folder / "out", "--overwrite"),
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(duration_s * draw.uniform(0.2, 1.05))
        process.send_signal(signal.SIGKILL)
        killed = process.wait() == -signal.SIGKILL
        num_killed += killed
        is_complete = (folder / "out.manifest.json").exists()
        assert killed or is_complete
        if is_complete:  # a manifest means that everything is in its place
            assert outputs(folder) == expected
        num_reused += len(list(folder.glob(".out.partial/*.shard")))
    assert num_reused > 0
    for folder in [path for path in tmp_path.iterdir() if path.name.isdigit()]:
        ended = run(*settings, "--output-prefix", folder / "out", "--overwrite")
        assert ended.returncode == 0, ended.stderr.decode()
        assert outputs(folder) == expected
        assert sorted(path.name for path in folder.iterdir()) == sorted(f"out{n}" for n in OUTPUTS)


def test_a_killed_worker_is_told_and_its_work_done_again(
    corpus: Path, tokenizer: str, tmp_path: Path
) -> None:
    settings = ["--input", corpus, "--tokenizer-model", tokenizer, "--max-rejected", 4]
    settings += ["--workers", 2, "--output-prefix", tmp_path / "out"]
    process = subprocess.Popen(
        command(*settings), env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + TIMEOUT_S
    while not list(tmp_path.glob(".out.partial/*.shard")) and time.monotonic() < deadline:
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2, err.decode()
    assert b"a tokenizing process died" in err and b"Traceback" not in err
    again = run(*settings)
    assert again.returncode == 0, again.stderr.decode()
    assert b"chunks of an interrupted run" in again.stdout


def test_work_resumes_after_ctrl_c(corpus: Path, tokenizer: str, tmp_path: Path) -> None:
    settings = ["--input", corpus, "--tokenizer-model", tokenizer, "--max-rejected", 4]
    settings += ["--workers", 1, "--output-prefix", tmp_path / "out"]
    process = subprocess.Popen(
        command(*settings),
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        # Children of a shell in the background ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + TIMEOUT_S
    while not list(tmp_path.glob(".out.partial/*.shard")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2 and b"Repeat the same command to resume" in err, err.decode()
    assert b"Traceback" not in err, err.decode()
    assert list(tmp_path.iterdir()) == [tmp_path / ".out.partial"]


def test_a_pipe_gives_what_the_file_gives(tmp_path: Path) -> None:
    lines = b"".join(b'{"text": "%d %d"}\n' % (i, i + 1) for i in range(40))
    (tmp_path / "c.jsonl").write_bytes(lines)
    ids = ["--tokenizer-type", "NullTokenizer", "--vocab-size", 50, "--workers", 1]
    for name, given, stdin in (
        ("file", tmp_path / "c.jsonl", None),
        ("pipe", "-", lines),
        ("packed", "-", gzip.compress(lines)),
    ):
        (tmp_path / name).mkdir()
        ended = run("--input", given, "--output-prefix", tmp_path / name / "out", *ids, stdin=stdin)
        assert ended.returncode == 0, ended.stderr.decode()
        assert b"40 documents read = 40 written + 0 rejected" in ended.stdout
        for suffix in ("bin", "idx"):
            file = f"out_text_document.{suffix}"
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "file" / file).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--workers", -1], "--workers -1: must be at least 0"),
        (["--json-keys", "text", "text"], "each only once"),
        (["--input", "{folder}/c.bin"], "give --input-format"),
        (
            ["--input", "{folder}/c.jsonl.zst"],
            "its name says zst, but its content",
        ),
        (["--input", "{folder}/c.parquet"], "not a Parquet file"),
        (
            ["--input-format", "parquet", "--input", "-"],
            "Parquet cannot be read from standard input",
        ),
        (["--vocab-size", 5], "c.jsonl:1: NullTokenizer: ids must be from 0 to 4"),
        (["--json-keys", "body"], "c.jsonl:1: key 'body' is missing"),
        (["--output-prefix", "{folder}/c.jsonl/out"], "c.jsonl"),
        (["--tokenizer-type", "TikTokenizer", "--tokenizer-model", "{folder}/c.bin"], "ranks"),
    ],
    ids=str,
)
def test_bad_input(arguments: list[object], expected: str, tmp_path: Path) -> None:
    for name in ("c.jsonl", "c.bin", "c.jsonl.zst", "c.parquet"):
        (tmp_path / name).write_text('{"text": "7 8"}\n')
    given = [str(each).format(folder=tmp_path) for each in arguments]
    base = ["--tokenizer-type", "NullTokenizer", "--vocab-size", 50, "--workers", 0]
    base += ["--input", tmp_path / "c.jsonl", "--output-prefix", tmp_path / "out"]
    ended = run(*base, *given)
    assert ended.returncode == 2, ended.stderr.decode()
    assert expected in ended.stderr.decode() and b"Traceback" not in ended.stderr
    assert not list(tmp_path.glob("out*"))
