"""tools/benchmark.py and tools/gpu_report.py: both sides do the same work, results are complete.

Tools run in a process that is forked with everything imported; one runs as a user starts it.
"""

import contextlib
import io
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT, TIMEOUT_S
from tests.ranks import run_ranks

SHAPE = (
    "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --vocab-size 64 --seq-length 16 "
    "--global-batch-size 4 --micro-batch-size 2"
).split()
Ended = tuple[int, str, str]
"""Exit code, stdout, stderr."""


def run_tools(*command_lines: list[str]) -> list[Ended]:
    """Run tools, each with its arguments, one after the other."""
    return run_ranks(_run_tools, 1, command_lines)[0]


def _run_tools(command_lines: tuple[list[str], ...]) -> list[Ended]:
    """In the forked process."""
    ended = []
    for arguments in command_lines:
        sys.argv = [str(ROOT / "tools" / arguments[0]), *arguments[1:]]
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(sys.argv[0], run_name="__main__")
            except SystemExit as exit_:
                code = int(exit_.code or 0)
        ended.append((code, out.getvalue(), err.getvalue()))
    return ended


def read(ended: Ended) -> dict[str, Any]:
    """The JSON object that a tool printed."""
    code, out, err = ended
    assert code == 0, err
    return json.loads(out)


CURVES = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --vocab-size 64 --seq-length 16 "
    "--micro-batch-size 2 --num-jacobi-iterations 1 --rounds 1"
).split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the files of the commands below."""
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def ended(folder: Path) -> dict[str, Ended]:
    """The commands that start processes: together, so that one server imports for all."""
    commands = {
        "train": [
            *("train", "--json", *SHAPE, *"--steps 1 --rounds 2 --warmup-steps 1".split()),
            *("--num-jacobi-iterations", "1", "--r-values", "2", "--roofline"),
            *("--plot", str(folder / "by_r.png"), "--profile", str(folder / "trace.json")),
        ],
        "checkpoint": ["checkpoint", "--json", *SHAPE, "--saves", "2"],
        "curves": [
            *("curves", *CURVES, "--variables", "thoughts", "--k-values", "0", "1"),
            *("--record", str(folder / "f/curves.json"), "--plot", str(folder / "f/curves.png")),
        ],
    }
    lines = (["benchmark.py", *arguments] for arguments in commands.values())
    return dict(zip(commands, run_tools(*lines), strict=True))


def test_train(ended: dict[str, Ended], folder: Path) -> None:
    result = read(ended["train"])
    ours, reference = result["ours"], result["reference"]
    assert ours["first_loss"] == pytest.approx(reference["first_loss"], abs=1e-5)
    assert ours["tokens_per_s"] == pytest.approx(64 / ours["ms_per_step"] * 1e3)
    assert ours["steps"] == 2 and ours["tflops"] > 0
    assert 0 <= ours["step_memory_gib"] < ours["peak_memory_gib"]
    speedup = result["speedup"]
    assert speedup["least"] <= speedup["median"] <= speedup["largest"]
    assert [row["num_jacobi_iterations"] for row in result["by_r"]] == [2]
    assert result["config"]["hidden_size"] == 32
    assert (folder / "by_r.png").read_bytes().startswith(b"\x89PNG")
    for side in (ours, reference):
        phases = side["phases_ms"]
        parts = ("forward", "backward", "gradients", "optimizer", "other")
        assert sum(phases[name] for name in parts) == pytest.approx(phases["total"])
        assert all(phases[name] > 0 for name in parts[:4]), phases
        assert phases["forward"] + phases["backward"] > 0.3 * phases["total"]
    assert result["peak_tflops"] is None and ours["mfu"] is None
    names = {
        event.get("name")
        for event in json.loads((folder / "trace.json").read_text())["traceEvents"]
    }
    assert {"forward", "backward", "optimizer", "aten::mm"} <= names
    passes = result["roofline"]["passes"]
    assert [row["slots_per_token"] for row in passes] == [1, 2, 2]
    for row in passes:
        assert row["reached"] == pytest.approx(row["floor_ms"] / row["forward_ms"])
        assert row["backward_ms"] > 0 and row["gigabytes"] > 0
    assert sum(row["share"] for row in passes) == pytest.approx(1)


def test_kernels_as_a_user_starts_it(tmp_path: Path) -> None:
    """From another folder."""
    record = tmp_path / "record.json"
    command = [sys.executable, str(ROOT / "tools/benchmark.py"), "kernels", *SHAPE]
    ended = subprocess.run(
        [*command, "--only", "SwiGLU", "interleave", "--record", str(record)],
        cwd=tmp_path,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert ended.returncode == 0, ended.stderr
    assert "eager/this" in ended.stdout and "SwiGLU" in ended.stdout
    result = json.loads(record.read_text())
    assert set(result["kernels"]) == {"SwiGLU", "interleave"}
    assert "not timed" in result["triton"]
    for kernel in result["kernels"].values():
        assert set(kernel["forms"]) == {"eager", "torch"}
        assert all(row["gb_per_s"] > 0 and row["error"] < 1e-5 for row in kernel["forms"].values())


def test_checkpoint(ended: dict[str, Ended]) -> None:
    result = read(ended["checkpoint"])
    assert len(result["stall_s_of_saves"]) == 2 and result["load_s"] > 0
    # Weights and two moments in fp32; the rest is the run's config and the like.
    assert result["bytes"] >= 12 * result["parameters"]


def test_curves(ended: dict[str, Ended], folder: Path) -> None:
    code, out, err = ended["curves"]
    assert code == 0, err
    assert "latent thoughts K" in out and "load" in out
    result = json.loads((folder / "f/curves.json").read_text())
    vanilla, base = result["curves"]["thoughts"]
    assert base["time"]["median"] == 1 == base["memory"]["measured"]
    assert vanilla["time"]["predicted"] < 0.3 and vanilla["memory"]["measured"] < 0.7
    assert base["memory_bytes"] == pytest.approx(base["predicted_memory_bytes"], rel=0.1)
    assert (folder / "f/curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_curves_over_ranks() -> None:
    variables = ["--variables", "data-parallel", "pipeline"]
    result = read(*run_tools(["benchmark.py", "curves", "--json", *CURVES, *variables]))
    for points in result["curves"].values():
        one, two = points
        assert (one["world_size"], two["world_size"]) == (1, 2)
        assert two["memory_bytes"] == pytest.approx(two["predicted_memory_bytes"], rel=0.1)


BAD_INPUT = [
    (["speed"], "the first argument must be one of train"),
    (["curves", "--rounds", "0"], "--rounds 0: must be at least 1"),
    (["curves", "--variables", "speed"], "variables"),
    (["curves", *CURVES, "--ranks", "3"], "--variables pipeline, 3"),
    (["curves", "--random-jacobi-iterations"], "--no-random-jacobi-iterations"),
    (["preprocess", "--num-layers", "2"], "--num-layers: no such flag"),
    (["preprocess", "--workers", "0"], "--workers: every number must be at least 1"),
    (["generate", "--new-tokens", "2"], "--recomputed-tokens 4: must be at most --new-tokens 2"),
    (
        ["generate", "--preset", "gpt2", "--seq-length", "1024", "--prompt-tokens", "1023"],
        "together more than the model's 1024 learned positions",
    ),
    (["train", "--rounds", "0"], "--rounds 0: must be at least 1"),
    (["train", "--plot", "x.png"], "--plot needs --r-values"),
    (["train", *SHAPE, "--num-layer", "2"], "num-layers"),
    (["train", *SHAPE, "--hidden-dropout", "0.1"], "the reference has 0.0 only"),
    (["kernels", *SHAPE, "--only", "nothing"], '"split and rotate"'),
    (["checkpoint", *SHAPE, "--saves", "0"], "--saves 0: must be at least 1"),
    (["checkpoint", *SHAPE, "--folder", "/nowhere"], "--folder /nowhere: no such folder"),
]


def test_bad_input() -> None:
    ended = run_tools(*(["benchmark.py", *arguments] for arguments, _ in BAD_INPUT))
    for (arguments, message), (code, _, err) in zip(BAD_INPUT, ended, strict=True):
        assert code == 2, (arguments, err)
        assert message in err and "Traceback" not in err, arguments


def test_preprocess(tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl"
    words = [f"{a}{b}{c}" for a in "bdfg" for b in "aeiou" for c in "klmn"]
    lines = (json.dumps({"text": " ".join(words[i % 7 :: 1 + i % 5])}) for i in range(300))
    corpus.write_text("".join(line + "\n" for line in lines))
    settings = ["--input", str(corpus), "--vocab-size", "310", "--rounds", "1"]
    result = read(*run_tools(["benchmark.py", "preprocess", "--json", *settings]))
    assert list(result["sides"]) == ["plain loop", "1 worker", "2 workers"]
    assert result["outputs_are_equal"] and result["text_bytes"] > 10_000
    for row in result["sides"].values():
        assert row["tokens_per_s_per_core"] * row["workers"] == pytest.approx(row["tokens_per_s"])
    assert "scaling from 1 to 2 workers" in result["ratios"]


def test_generate() -> None:
    sizes = "--batch-size 3 --prompt-tokens 40 --new-tokens 5 --recomputed-tokens 2".split()
    arguments = ["generate", "--json", *SHAPE, "--rounds", "2", *sizes]
    result = read(*run_tools(["benchmark.py", *arguments]))
    assert result["prefill"]["tokens_per_s"] == pytest.approx(120e3 / result["prefill"]["ms"])
    for side in ("decode", "recomputed"):
        assert result[side]["tokens_per_s"] == pytest.approx(3e3 / result[side]["ms"])
    speedup = result["speedup"]
    assert 0 < speedup["least"] <= speedup["median"] <= speedup["largest"]
    assert result["config"]["hidden_size"] == 32 and result["rounds"] == 2


@pytest.mark.slow
def test_gpu_report_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step on the CPU, then the same again, and the plan."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    tiny = ["gpu_report.py", "--allow-cpu", "--tiny", "--folder", str(tmp_path)]
    here = [*tiny, "--parts", "doctor"]
    first, second, plan = run_tools(here, here, ["gpu_report.py", "--dry-run"])
    assert first[0] == 0 and "doctor: about" in first[1], first
    assert "gloo between ranks" in (tmp_path / "report.md").read_text()
    assert second[0] == 0 and "doctor: has a result" in second[1], second
    assert plan[0] == 0 and "--preset llama-1.4b --seq-length 2048" in plan[1], plan
