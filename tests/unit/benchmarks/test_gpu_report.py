"""Parts that crash, hang or run out of memory; going on; targets."""

import json
import sys

import pytest
import tyro

from benchmarks import gpu_report
from benchmarks.commands import COMMANDS
from benchmarks.gpu_findings import check_targets, write_findings
from benchmarks.gpu_parts import MODELS, Part, build_parts
from benchmarks.gpu_report import GpuReportOptions, read_results, run_parts
from megatron_ponder.config.parse import parse_args
from megatron_ponder.config.resolve import resolve
from megatron_ponder.errors import BackendError, ConfigError

RUN = "import sys; print('a library says hello'); print('{\\n \"value\": 7}')"


def python(code):
    return (sys.executable, "-c", code)


def part(name, *codes, minutes=0.1, **more):
    return Part(name=name, commands=tuple(map(python, codes)), minutes=minutes, **more)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "parts").mkdir()
    return tmp_path


def test_one_part_that_fails_does_not_stop_the_others(folder):
    parts = [
        part("crash", "import os; os.abort()"),
        part("no json", "print('nothing')"),
        part("good", RUN),
        part("text", "print('words')", prints_json=False),
    ]
    run_parts(GpuReportOptions(), parts, folder)
    results = read_results(folder)
    assert {name: r["status"] for name, r in results.items()} == {
        "crash": "failed",
        "no json": "failed",
        "good": "ok",
        "text": "ok",
    }
    assert results["good"]["output"] == {"value": 7}
    report = (folder / "report.md").read_text()
    assert "crash: failed, exit code -6" in report
    assert json.loads((folder / "report.json").read_text())["parts"] == results


def test_what_is_there_is_not_run_again(folder):
    mark = folder / "mark"
    code = f"open({str(mark)!r}, 'a').write('x'); {RUN}"
    crash = f"open({str(mark)!r}, 'a').write('y'); raise SystemExit(3)"
    for _ in range(2):
        run_parts(GpuReportOptions(), [part("good", code), part("bad", crash)], folder)
    assert mark.read_text() == "xyy"
    run_parts(GpuReportOptions(), [part("good", code + "; 1")], folder)  # another command
    assert mark.read_text() == "xyyx"


def test_out_of_memory_tries_the_next_command(folder):
    too_large = "import sys; sys.exit('BackendError: ours ran out of the device\\'s memory (x)')"
    wrong = "import sys; sys.exit('ConfigError: no such flag')"
    parts = [part("falls back", too_large, RUN), part("does not", wrong, RUN)]
    run_parts(GpuReportOptions(), parts, folder)
    results = read_results(folder)
    assert results["falls back"]["status"] == "ok"
    assert results["falls back"]["command"] == list(python(RUN))
    assert results["does not"]["status"] == "failed"


def test_budget(folder):
    """A part that is too long is left out; one that takes longer than it said is ended."""
    parts = [
        part("hangs", "import time; time.sleep(60)", minutes=0.01),  # more than the budget has
        part("long", RUN, minutes=5),
    ]
    run_parts(GpuReportOptions(budget_minutes=0.05), parts, folder)
    results = read_results(folder)
    assert list(results) == ["hangs"] and results["hangs"]["status"] == "out of time"
    assert results["hangs"]["seconds"] < 20


def test_micro_batches_follow_the_memory():
    def first_sizes(memory_gib):
        parts = {p.name: p for p in build_parts(folder="x", is_tiny=False, memory_gib=memory_gib)}
        command = parts["train-410m"].commands[0]
        return command[command.index("--micro-batch-size") + 1]

    assert (first_sizes(139.0), first_sizes(79.0), first_sizes(None)) == ("8", "4", "4")


@pytest.mark.parametrize("is_tiny", [False, True])
def test_commands_have_flags_that_exist(is_tiny):
    """Every command of tools/benchmark.py makes its options and a run."""
    checked = 0
    for one in build_parts(folder="x", is_tiny=is_tiny, memory_gib=139.0):
        for command in one.commands:
            if command[1] != "tools/benchmark.py":
                continue
            chosen, arguments = COMMANDS[command[2]], command[3:]
            options, settings = tyro.cli(chosen.options, args=arguments, return_unknown_args=True)
            config = resolve(parse_args(settings, prog="test"), world_size=1)
            assert options.json and config.model.vocab_size is not None
            checked += 1
    assert checked > 12


def test_no_gpu_and_bad_flags(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BackendError, match="no CUDA device"):
        gpu_report.run_report(GpuReportOptions(folder=str(tmp_path)))
    with pytest.raises(ConfigError, match="--allow-cpu needs --tiny"):
        GpuReportOptions(allow_cpu=True)
    with pytest.raises(ConfigError, match="parts are machine, doctor, tests, train-410m"):
        gpu_report.run_report(GpuReportOptions(parts=("nothing",), dry_run=True))


def run(model, backend, mfu, speedup, is_whole=True):
    return {
        "model": model,
        "backend": backend,
        "mfu": mfu,
        "speedup": speedup,
        "is_whole_model": is_whole,
    }


def test_targets():
    rows = [
        run("410m", "default", 0.39, 1.45),
        run("410m", "te", 0.41, 1.2),
        run("410m", "fp8", 0.44, 2.0),
        run("1.4b", "default", 0.99, 9.9, is_whole=False),
    ]
    found = {(t["model"], t["what"]): t for t in check_targets(rows)}
    assert len(found) == 3 * len(MODELS)
    mfu = found["410m", "MFU"]
    assert (mfu["found"], mfu["backend"], mfu["is_met"]) == (0.41, "te", True)
    assert found["410m", "MFU with fp8 linears"]["is_met"] is False
    assert found["410m", "tokens/s over the reference's"]["found"] == 1.45
    assert found["1.4b", "MFU"]["is_met"] is None


def test_findings_of_nothing(folder):
    write_findings(folder)
    assert "not measured" in (folder / "report.md").read_text()
