"""Evaluation and sampling of a trained checkpoint, against each other and against the training."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F

from megatron_ponder.inference.evaluation import evaluate, windows
from megatron_ponder.inference.options import (
    CheckpointOptions,
    EvaluateOptions,
    GenerateOptions,
    SamplingOptions,
)
from megatron_ponder.inference.generation import run
from tests.e2e import launch
from tests.e2e.launch import ROOT, flags, run_main, torchrun
from tests.ranks import run_ranks
from tests.unit.data.corpora import read_documents

SEQ_LENGTH = launch.SMALL["seq_length"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt to count, saved by two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("inference")
    prefix = launch.write_dataset(folder)
    torchrun(
        2,
        flags(
            data_path=prefix,
            train_iters=60,
            tensor_model_parallel_size=2,
            num_jacobi_iterations=2,
            save=folder / "run",
        ),
    )
    return folder


def options(folder: Path, **settings: Any) -> EvaluateOptions:
    return EvaluateOptions(checkpoint=CheckpointOptions(load=str(folder / "run")), **settings)


def evaluate_on(world_size: int, given: EvaluateOptions) -> dict[str, Any]:
    return run_ranks(evaluate, world_size, given)[0]


def test_loss_is_that_of_the_dumped_logits_on_every_layout(folder: Path, tmp_path: Path) -> None:
    prefix = str(folder / "corpus_text_document")
    stream = [launch.VOCAB_SIZE - 1] + [i for d in read_documents(prefix) for i in d]
    batches = list(windows(torch.tensor(stream), SEQ_LENGTH, micro_batch_size=10**9))
    whole_tokens, whole_labels = batches[0]
    rest_tokens, rest_labels = batches[1]
    losses = []
    for number, (tokens, labels) in enumerate(
        ((whole_tokens, whole_labels), (rest_tokens, rest_labels))
    ):
        ids, out = tmp_path / f"{number}.npy", tmp_path / f"{number}.logits.npy"
        numpy.save(ids, tokens.numpy())
        result = evaluate_on(1, options(folder, token_ids=str(ids), dump_logits=str(out)))
        logits = torch.from_numpy(numpy.load(out))
        assert list(logits.shape) == [*tokens.shape, launch.VOCAB_SIZE] == result["shape"]
        losses.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none"))
        again = tmp_path / "again.npy"
        evaluate_on(2, options(folder, token_ids=str(ids), dump_logits=str(again)))
        assert numpy.abs(numpy.load(again) - logits.numpy()).max() <= 1e-5
    expected = torch.cat(losses).double().mean().item()
    for world_size in (1, 2):
        result = evaluate_on(world_size, options(folder, data_path=prefix, micro_batch_size=3))
        assert result["loss"] == pytest.approx(expected, abs=1e-6)
        assert result["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
        assert result["num_tokens"] == len(stream) - 1 and result["num_jacobi_iterations"] == 2
    trained = launch.losses(folder / "run")
    assert expected < 0.7 * trained[1]


def test_other_r_and_fewer_tokens(folder: Path) -> None:
    prefix = str(folder / "corpus_text_document")
    none = evaluate_on(1, options(folder, data_path=prefix, num_jacobi_iterations=(0,)))
    some = evaluate_on(1, options(folder, data_path=prefix))
    assert none["num_jacobi_iterations"] == 0 and none["loss"] != some["loss"]
    assert evaluate_on(1, options(folder, data_path=prefix, max_tokens=50))["num_tokens"] == 50


def test_text_files_give_what_the_dataset_of_them_gives(folder: Path) -> None:
    by_prefix = evaluate_on(1, options(folder, data_path=str(folder / "corpus_text_document")))
    by_text = evaluate_on(1, options(folder, text_file=(str(folder / "corpus.jsonl"),)))
    assert by_text["loss"] == by_prefix["loss"]


def written(given: GenerateOptions) -> tuple[str, dict[str, Any]]:
    """What a rank is told to show, and the result."""
    pieces: list[str] = []
    return "".join([pieces.append(""), *pieces][1:]), run(given, pieces.append)


def test_command_lines(folder: Path) -> None:
    """As a user calls them."""
    ended = []
    load = ["--load", str(folder / "run")]
    for command in (
        ["evaluate.py", *load, "--data-path", str(folder / "corpus_text_document")],
        ["generate.py", *load, "--prompt", "1 2 3", "--temperature", "0", "--max-new-tokens", "2"],
    ):
        ended.append(
            subprocess.run(
                [sys.executable, str(ROOT / "tools" / command[0]), *command[1:]],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                capture_output=True,
                text=True,
                timeout=launch.LAUNCH_TIMEOUT_S,
            )
        )
        assert ended[-1].returncode == 0 and "Warning" not in ended[-1].stderr, ended[-1].stderr
    assert json.loads(ended[0].stdout)["method"] == "ponderlm2"
    assert len(ended[1].stdout.split()) == 5


def test_what_cannot_be_dumped(folder: Path, tmp_path: Path) -> None:
    from megatron_ponder.errors import DataError

    bad = tmp_path / "bad.npy"
    numpy.save(bad, numpy.array([[1, launch.VOCAB_SIZE]]))
    for path, reason in ((bad, "has ids from 1 to 64"), (tmp_path / "none.npy", "not a .npy file")):
        with pytest.raises(DataError, match=reason):
            evaluate(options(folder, token_ids=str(path), dump_logits=str(tmp_path / "out.npy")))
    assert run_main(flags(load=folder / "run", train_iters=1, data_path=None))[0] == 2
