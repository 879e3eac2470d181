"""Training as a user starts it: stop and resume, layouts, signals, precision, what it leaves."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_ponder.config.schema import MethodConfig
from megatron_ponder.ponder.training_plan import jacobi_iterations
from tests.e2e import launch
from tests.e2e.launch import flags, losses, records, run_main, stored_tensors, train

TRAIN_ITERS = 8
STOP_AT = 6
RANDOM_R = {
    "random_jacobi_iterations": True,
    "min_jacobi_iterations": 1,
    "max_jacobi_iterations": 4,
}


@pytest.fixture(scope="module")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return launch.write_dataset(tmp_path_factory.mktemp("data"))


def _assert_same_tensors(first: Path, second: Path, iteration: int) -> None:
    """Difference 0 in weights and optimizer state."""
    expected, actual = stored_tensors(first, iteration), stored_tensors(second, iteration)
    assert expected.keys() == actual.keys() and len(expected) > 20
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_stop_and_resume_is_exact(data_path: str, tmp_path: Path) -> None:
    """Data parallel 2 with the distributed optimizer, random R, dropout, workers, log windows."""
    settings = {
        **RANDOM_R,
        "data_path": data_path,
        "train_iters": TRAIN_ITERS,
        "micro_batch_size": 2,
        "use_distributed_optimizer": True,
        "hidden_dropout": 0.1,
        "num_workers": 1,
        "log_interval": 4,
        "eval_interval": 3,
    }
    whole, parted = tmp_path / "whole", tmp_path / "parted"
    train(flags(**settings, save=whole), world_size=2)
    parts = {**settings, "save": parted, "load": parted, "tensorboard_dir": tmp_path / "tb"}
    output = train(flags(**parts, exit_interval=STOP_AT), world_size=2)
    assert f"stopped after iteration {STOP_AT}: --exit-interval" in output
    # What a crash after the checkpoint would leave: a line too many, and half a line.
    metrics = parted / "metrics.jsonl"
    before = metrics.read_text()
    metrics.write_text(before + '{"split": "train", "iteration": 7}\n{"split": "tra')
    output = train(flags(**parts), world_size=2)
    assert "training is done" in output

    assert metrics.read_text().startswith(before)
    for split, iterations in (("train", [4, 8]), ("valid", [3, 6, TRAIN_ITERS])):
        assert records(parted, split) == records(whole, split)
        assert [record["iteration"] for record in records(whole, split)] == iterations
    _assert_same_tensors(whole, parted, TRAIN_ITERS)
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [event.step for event in events.Scalars("lm loss")] == [4, 8]
    assert [event.step for event in events.Scalars("lm loss validation")] == [3, 6, 8]


def test_signal_to_one_rank_saves_on_all_and_the_run_resumes(
    data_path: str, tmp_path: Path
) -> None:
    """Under torchrun."""
    settings = {"data_path": data_path, "save": tmp_path, "load": tmp_path, "log_interval": 1}
    process = launch.start_torchrun(2, flags(**settings, train_iters=100_000))
    started = time.monotonic()
    while not (tmp_path / "metrics.jsonl").is_file() or len(losses(tmp_path)) < 3:
        assert time.monotonic() < started + launch.LAUNCH_TIMEOUT_S
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    _signal_rank(process.pid, rank=1)
    output, _ = process.communicate(timeout=launch.LAUNCH_TIMEOUT_S)
    assert process.returncode == 0, output
    stopped = re.search(r"stopped after iteration (\d+): a signal on another rank", output)
    assert stopped, output
    last = int(stopped[1])
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == f"{last}\n"
    code, out, _ = run_main(flags(**settings, train_iters=last + 2))
    assert code == 0 and "random generators seeded anew" in out
    assert list(losses(tmp_path)) == list(range(1, last + 3))


def _signal_rank(torchrun_pid: int, rank: int) -> None:
    """SIGTERM to one of the processes that torchrun started."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = re.search(r"PPid:\s+(\d+)", (folder / "status").read_text())
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:  # gone meanwhile
            continue
        if parent and int(parent[1]) == torchrun_pid and f"RANK={rank}".encode() in environment:
            os.kill(int(folder.name), signal.SIGTERM)
            return
    raise AssertionError(f"torchrun has no rank {rank}")


TENSOR = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PIPELINE = {"pipeline_model_parallel_size": 2, "overlap_p2p_communication": True}
SHARED_SEQUENCES = {"context_parallel_size": 2, "recompute_granularity": "pass"}


@pytest.mark.parametrize(
    ("num_ranks", "layout"),
    [pytest.param(2, TENSOR, marks=pytest.mark.slow), (4, PIPELINE | SHARED_SEQUENCES)],
    ids=["tensor", "pipeline and context"],
)
def test_a_checkpoint_of_one_process_resumes_in_another_layout(
    num_ranks: int, layout: dict, data_path: str, tmp_path: Path
) -> None:
    """With the losses of the one process, in training and in evaluation."""
    one, other = tmp_path / "one", tmp_path / "other"
    settings = {**RANDOM_R, "data_path": data_path, "train_iters": 12, "save_interval": 6}
    settings["eval_interval"] = 9
    train(flags(**settings, save=one))
    train(flags(**settings, **layout, load=one, ckpt_step=6, save=other), num_ranks)
    expected, actual = losses(one), losses(other)
    assert list(actual) == list(range(7, 13))
    for iteration, loss in actual.items():
        assert loss == pytest.approx(expected[iteration], abs=1e-5)
    evaluations = zip(records(other, "valid"), records(one, "valid"), strict=True)
    for here, there in evaluations:
        assert here["lm_loss"] == pytest.approx(there["lm_loss"], abs=1e-5)
        assert here["num_tokens"] == there["num_tokens"]


def test_everything_a_single_process_leaves(data_path: str, tmp_path: Path) -> None:
    """bf16 learns; R is the function it is said to be; old checkpoints go; the config is whole."""
    run = tmp_path / "run"
    settings = {**RANDOM_R, "data_path": data_path, "bf16": True, "eval_interval": 10}
    settings |= {"train_iters": 30, "save": run, "save_interval": 10, "keep_checkpoints": 2}
    code, out, err = run_main(flags(**settings, split="80,10,10"))
    assert code == 0, err
    trained = losses(run)
    assert list(trained) == list(range(1, 31))
    assert trained[30] < 0.5 * trained[1]
    method = MethodConfig(**RANDOM_R)
    drawn = [record["num_jacobi_iterations"] for record in records(run, "train")]
    assert drawn == [jacobi_iterations(method, 1234, iteration) for iteration in trained]
    assert len(set(drawn)) == 4
    assert [record["iteration"] for record in records(run, "valid")] == [10, 20, 30]
    (test,) = records(run, "test")
    assert test["lm_loss"] < trained[1] and test["num_tokens"] == 2 * 8 * 32

    names = {path.name for path in run.iterdir()}
    latest = "latest_checkpointed_iteration.txt"
    assert names == {"iter_0000020", "iter_0000030", latest, "metrics.jsonl"}
    stored = (run / "iter_0000030" / "resolved_config.yaml").read_text()
    assert "max_jacobi_iterations: 4" in stored and stored.rstrip() in out
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert {"tokens_per_s", "tflops_per_device", "mfu", "eta_s", "peak_memory_gib"} <= line.keys()
    for field in ("consumed samples:", "elapsed time per iteration (ms):", "grad norm:"):
        assert field in out

    # Run again: already complete. As a start for another run: weights only.
    assert "already complete" in run_main(flags(**settings, load=run))[1]
    tuned = tmp_path / "tuned"
    finetune = {**settings, "load": run, "finetune": True, "save": tuned, "train_iters": 3}
    code, out, err = run_main(flags(**{**finetune, "bf16": False}))
    assert code == 0 and "everything else starts afresh" in out, err
    assert losses(tuned)[1] < 0.7 * trained[1]
    shutil.rmtree(tuned)


def test_a_run_ends_when_its_time_is_up(data_path: str, tmp_path: Path) -> None:
    settings = {"data_path": data_path, "save": tmp_path, "train_iters": 100_000}
    code, out, _ = run_main(flags(**settings, exit_duration_in_mins=0.02))
    assert code == 0 and "--exit-duration-in-mins" in out
    assert stored_tensors(tmp_path, max(losses(tmp_path)))


def test_a_run_that_diverges_is_stopped_with_its_weights_as_they_were(
    data_path: str, tmp_path: Path
) -> None:
    settings = {"data_path": data_path, "save": tmp_path, "train_iters": 40, "save_interval": 1}
    code, out, err = run_main(flags(**settings, lr=1e30, clip_grad=0.0))
    assert code == 2
    assert "TrainingError" in err and "not finite in the last 10 iterations" in err
    assert out.count("the update is skipped") == 10
    weights = stored_tensors(tmp_path, max(losses(tmp_path)) - 1)
    before = stored_tensors(tmp_path, max(losses(tmp_path)) - 5)
    assert all(torch.equal(weights[name], tensor) for name, tensor in before.items())
