"""Steps that crash, hang or run out of memory; resuming; targets."""

import json
import sys

import pytest
import tyro

from benchmarks import gpu_report
from benchmarks.commands import COMMANDS
from benchmarks.gpu_commands import MODELS, Step, build_steps
from benchmarks.gpu_report import (
    GpuReportOptions,
    check_targets,
    read_statuses,
    run_report,
    run_steps,
    training_runs,
)
from megatron_ponder.config.parse import parse_args
from megatron_ponder.config.resolve import resolve
from megatron_ponder.errors import BackendError, ConfigError

TOO_LARGE = "import sys; sys.exit('BackendError: ours ran out of the device\\'s memory (x)')"
WRONG = "import sys; sys.exit('ConfigError: no such flag')"


def step(name, *codes, minutes=0.1):
    return Step(name, minutes, [[sys.executable, "-c", code] for code in codes])


def statuses(folder):
    return {name: status["status"] for name, status in read_statuses(folder).items()}


def test_one_step_that_fails_does_not_stop_the_others(tmp_path):
    record = tmp_path / "parts/good.json"
    steps = [
        step("crash 1.4b", "import os; os.abort()"),
        step("good", f"print('seven'); open({str(record)!r}, 'w').write('[7]')"),
        step("falls back", TOO_LARGE, "print('smaller')"),
        step("wrong", WRONG, "print('smaller')"),
    ]
    assert not run_steps(steps, tmp_path, "this device", 5.0)
    expected = {"crash 1.4b": "failed", "good": "ok", "falls back": "ok", "wrong": "failed"}
    assert statuses(tmp_path) == expected
    report = (tmp_path / "report.md").read_text()
    for words in ("exit code -6", "seven", "smaller", "no such flag", "this device"):
        assert words in report
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["records"] == {"good": [7]} and found["targets"][0]["found"] is None


def test_a_report_is_resumed(tmp_path):
    """What succeeded is not run again, unless its command or the device has changed."""
    mark = tmp_path / "mark"
    good = f"open({str(mark)!r}, 'a').write('x')"
    bad = f"open({str(mark)!r}, 'a').write('y'); raise SystemExit(3)"
    for _ in range(2):
        run_steps([step("good", good), step("bad", bad)], tmp_path, "a", 5.0)
    assert mark.read_text() == "xyy"
    assert run_steps([step("good", good + "; 1")], tmp_path, "a", 5.0)
    assert run_steps([step("good", good + "; 1")], tmp_path, "b", 5.0)
    assert mark.read_text() == "xyyxx"


def test_budget(tmp_path):
    """A step that is too long is skipped; one that takes longer than it said is killed."""
    steps = [
        step("hangs", "import time; time.sleep(60)", minutes=0.01),
        step("long", "print()", minutes=5),
    ]
    assert not run_steps(steps, tmp_path, "a", 0.03)
    assert statuses(tmp_path) == {"hangs": "out of time"}
    assert read_statuses(tmp_path)["hangs"]["minutes"] < 0.3


def test_micro_batches_follow_the_memory(tmp_path):
    def first_size(memory_gib):
        steps = {s.name: s for s in build_steps(tmp_path, memory_gib, is_tiny=False)}
        command = steps["train-410m"].commands[0]
        return command[command.index("--micro-batch-size") + 1]

    assert (first_size(139.0), first_size(79.0), first_size(0.0)) == ("8", "4", "4")


@pytest.mark.parametrize("is_tiny", [False, True])
def test_commands_have_flags_that_exist(is_tiny, tmp_path):
    """Every command of tools/benchmark.py makes its options and a run."""
    commands = {
        (command[2], tuple(command[3:]))
        for one in build_steps(tmp_path, 139.0, is_tiny)
        for command in one.commands[:1]  # the others differ in the size of a batch
        if command[1] == "tools/benchmark.py"
    }
    assert len(commands) > 12
    for name, arguments in commands:
        options, settings = tyro.cli(
            COMMANDS[name].options, args=list(arguments), return_unknown_args=True
        )
        config = resolve(parse_args(settings, prog="test"), world_size=1)
        assert options.record.startswith(str(tmp_path)) and config.model.vocab_size is not None


def test_no_gpu_and_bad_flags(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(BackendError, match="no CUDA device"):
        run_report(GpuReportOptions(folder=str(tmp_path)))
    with pytest.raises(ConfigError, match="--allow-cpu needs --tiny"):
        GpuReportOptions(allow_cpu=True)
    monkeypatch.setattr(gpu_report, "_find_device", lambda options: ("none", 0.0))
    with pytest.raises(ConfigError, match="parts are machine, doctor, tests, train-410m"):
        run_report(GpuReportOptions(parts=("nothing",), dry_run=True))


def record(tokens_per_s, mfu, **more):
    ours = {"ms_per_step": 1.0, "tokens_per_s": tokens_per_s, "tflops": 1.0, "mfu": mfu}
    shape = {"num_layers": 24, "hidden_size": 1024, "vocab_size": 32000, "micro_batch_size": 4}
    return {"ours": ours | {"peak_memory_gib": 1.0}, "config": shape} | more


def test_targets(monkeypatch):
    shape = {"num_layers": 24, "hidden_size": 1024, "vocab_size": 32000}
    monkeypatch.setitem(gpu_report.PRESETS, "llama-410m", shape)
    records = {
        "train-410m": record(
            145.0, 0.39, reference={"tokens_per_s": 100.0}, speedup={"median": 1.45}
        ),
        "train-410m-te": record(120.0, 0.41),
        "train-410m-fp8": record(200.0, 0.44),
        "train-1.4b-te": record(990.0, 0.99),  # not of that model
    }
    runs = training_runs(records)
    speedups = {run["backend"]: run["speedup"] for run in runs if run["model"] == "410m"}
    assert speedups == {"default": 1.45, "te": 1.2, "fp8": 2.0}
    found = {(t["model"], t["what"]): t for t in check_targets(runs)}
    assert len(found) == 3 * len(MODELS)
    mfu = found["410m", "MFU"]
    assert (mfu["found"], mfu["backend"], mfu["is_met"]) == (0.41, "te", True)
    assert found["410m", "MFU with fp8 linears"]["is_met"] is False
    assert found["410m", "tokens/s over the reference's"]["found"] == 1.45
    assert found["1.4b", "MFU"]["is_met"] is None
