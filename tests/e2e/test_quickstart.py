"""`make quickstart`'s command from end to end, with small models and a part of the corpus."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from tests.e2e.launch import ROOT

SMALL = """
num_layers: 1
hidden_size: 32
num_attention_heads: 2
seq_length: 32
micro_batch_size: 2
global_batch_size: 4
train_iters: 40
lr: 1.0e-2
log_interval: 5
eval_interval: 20
eval_iters: 2
save_interval: 10
num_workers: 0
"""


def start(folder: Path) -> subprocess.Popen:
    config = folder.parent / "small.yaml"
    config.write_text(SMALL)
    library = folder.parent / "library"
    if not library.exists():
        stdlib = Path(sysconfig.get_paths()["stdlib"])
        shutil.copytree(stdlib / "asyncio", library)
        for module in stdlib.glob("[a-e]*.py"):  # some of which are held out
            shutil.copy(module, library)
    flags = ["--folder", folder, "--config", config, "--library", library, "--vocab-size", "400"]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "examples/quickstart/run.py"), *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_interrupted_resumed_and_run_again(tmp_path: Path) -> None:
    folder = tmp_path / "quickstart"
    process = start(folder)
    metrics = folder / "vanilla" / "metrics.jsonl"
    deadline = time.monotonic() + 200
    while not (folder / "vanilla" / "latest_checkpointed_iteration.txt").is_file():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "Repeat the same command to resume" in output

    output = finish(start(folder))
    assert "skipped" in output and "Traceback" not in output
    begun = re.search(r"resuming from the checkpoint of iteration (\d+)", output)
    assert begun and int(begun[1]) >= 10
    for name in ("vanilla", "ponderlm2"):
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        trained = [r["iteration"] for r in records if r["split"] == "train"]
        assert trained == list(range(5, 41, 5))
        evaluation = json.loads((folder / f"{name}.evaluation.json").read_text())
        assert evaluation["num_tokens"] > 1000 and 0 < evaluation["loss"] < 7
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    report = (folder / "report.txt").read_text()
    assert report.strip() in output
    for part in (
        *("vanilla", "PonderLM-2", "compute/token", "bits/byte", "sample of PonderLM-2"),
        "evaluated with transformers alone (PonderLlamaForCausalLM)",
    ):
        assert part in report
    ours = json.loads((folder / "ponderlm2.evaluation.json").read_text())
    theirs = json.loads((folder / "ponderlm2-huggingface.json").read_text())
    assert abs(ours["loss"] - theirs["loss"]) < 1e-5
    assert theirs["sample"].startswith("def get_")

    before = metrics.stat().st_mtime_ns
    output = finish(start(folder))
    assert output.count("done before, skipped") == 12 and report.strip() in output
    assert metrics.stat().st_mtime_ns == before
