"""Evaluation and sampling of a trained checkpoint, against each other and against the training."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F

from megatron_ponder.inference.evaluation import evaluate, windows
from megatron_ponder.inference.generation import run
from megatron_ponder.inference.options import (
    CheckpointOptions,
    EvaluateOptions,
    GenerateOptions,
    SamplingOptions,
)
from tests.commands import run_forked, run_fresh
from tests.e2e import launch
from tests.e2e.launch import flags, run_main, train
from tests.ranks import RanksFailed, run_ranks
from tests.unit.data.corpora import read_documents

SEQ_LENGTH = launch.SMALL["seq_length"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learnt to count, saved by two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("inference")
    prefix = launch.write_dataset(folder)
    settings = {"train_iters": 60, "micro_batch_size": 8, "num_jacobi_iterations": 2}
    settings |= {"eval_iters": 0, "tensor_model_parallel_size": 2, "save": folder / "run"}
    train(flags(data_path=prefix, **settings), world_size=2)
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


def shown(given: GenerateOptions) -> tuple[str, dict[str, Any]]:
    """What a rank is told to print, and the result."""
    pieces: list[str] = []
    result = run(given, pieces.append)
    return "".join(pieces), result


def generate(folder: Path, *prompts: str, world_size: int = 1, **settings: Any):
    names = {field.name for field in dataclasses.fields(SamplingOptions)}
    sampling = {name: settings.pop(name) for name in names & settings.keys()}
    given = GenerateOptions(
        checkpoint=CheckpointOptions(load=str(folder / "run")),
        prompt=prompts,
        sampling=SamplingOptions(**{"max_new_tokens": 6, "temperature": 0.0} | sampling),
        **settings,
    )
    by_rank = run_ranks(shown, world_size, given)
    assert len({text for text, _ in by_rank}) == 1
    return by_rank[0]


def test_the_model_counts_on(folder: Path) -> None:
    """Greedy, and drawn: the same seed draws the same, on any layout and in any company."""
    prompt = " 7 8 9 10 11"
    for settings in ({}, {"world_size": 2}, {"use_cache": False}):
        text, result = generate(folder, prompt, **settings)
        assert text == prompt + " 12 13 14 15 16 17\n"
        (only,) = result["texts"]
        assert only["text"] == " 12 13 14 15 16 17" and only["num_prompt_tokens"] == 5
        assert only["finish_reason"] == "max_new_tokens" and result["num_new_tokens"] == 6
    wild = {"temperature": 30.0, "seed": 1}
    drawn, _ = generate(folder, prompt, **wild)
    assert drawn == generate(folder, prompt, world_size=2, **wild)[0]
    assert drawn != generate(folder, prompt, temperature=30.0, seed=2)[0]
    _, result = generate(folder, prompt, "3 4", prompt, micro_batch_size=2, **wild)
    assert prompt + result["texts"][0]["text"] + "\n" == drawn
    assert result["texts"][2]["text"] != result["texts"][0]["text"]


def test_many_texts_of_a_file(folder: Path, tmp_path: Path) -> None:
    prompts = [" ".join(str(start + i) for i in range(1 + 2 * start)) for start in range(5)]
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(prompts) + "\n")
    text, result = generate(folder, prompt_file=str(file), micro_batch_size=3)
    assert [row["prompt"] for row in result["texts"]] == prompts
    shortest, longest = (generate(folder, prompt)[1]["texts"][0] for prompt in prompts[::4])
    assert result["texts"][::4] == [shortest, longest]
    assert text.startswith(f"--- 1 of 5\n{prompts[0]}{shortest['text']}\n--- 2 of 5\n")


def test_strides_and_several_r(folder: Path, tmp_path: Path) -> None:
    """The loss of overlapping windows is that of their dumped logits; R by R as one by one."""
    prefix, stride = str(folder / "corpus_text_document"), 12
    given = {"data_path": prefix, "max_tokens": 150, "stride": stride}
    stream = [launch.VOCAB_SIZE - 1] + [i for d in read_documents(prefix) for i in d][:150]
    losses = []
    for number, (tokens, labels) in enumerate(
        windows(torch.tensor(stream), SEQ_LENGTH, 10**9, stride)
    ):
        ids, out = tmp_path / f"{number}.npy", tmp_path / f"{number}.logits.npy"
        numpy.save(ids, tokens.numpy())
        evaluate_on(1, options(folder, token_ids=str(ids), dump_logits=str(out)))
        logits = torch.from_numpy(numpy.load(out))[:, -labels.size(1) :]
        losses.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none"))
    assert number == 2  # a first window, the overlapping ones, a shorter last one
    result = evaluate_on(1, options(folder, **given))
    assert result["loss"] == pytest.approx(torch.cat(losses).double().mean().item(), abs=1e-6)
    assert result["stride"] == stride and result["num_tokens"] == 150 == len(torch.cat(losses))
    several = evaluate_on(2, options(folder, **given, num_jacobi_iterations=(2, 0, 5)))
    assert [row["num_jacobi_iterations"] for row in several["by_r"]] == [2, 0, 5]
    for row in several["by_r"]:
        r = row["num_jacobi_iterations"]
        alone = evaluate_on(1, options(folder, **given, num_jacobi_iterations=(r,)))
        assert row["loss"] == pytest.approx(alone["loss"], abs=1e-6)
        assert alone["num_jacobi_iterations"] == r and "by_r" not in alone
    assert several["by_r"][0]["loss"] == pytest.approx(result["loss"], abs=1e-6)
    with pytest.raises(RanksFailed, match="--stride 33: must be at most the 32 tokens"):
        evaluate_on(1, options(folder, data_path=prefix, stride=33))


def test_command_lines(folder: Path) -> None:
    """As a user calls them."""
    load = ("--load", folder / "run")
    prompt = ("--prompt", "1 2 3", "--temperature", 0, "--max-new-tokens", 2)
    scored = run_fresh("tools/evaluate.py", *load, "--data-path", folder / "corpus_text_document")
    written = run_fresh("tools/generate.py", *load, *prompt)
    for ended in (scored, written):
        assert ended.returncode == 0 and "Warning" not in ended.stderr, ended.stderr
    assert json.loads(scored.stdout)["method"] == "ponderlm2"
    assert written.stdout == "1 2 3 4 5\n" and "2 tokens in " in written.stderr
    several = ("--prompt", "1 2", "--prompt", "3", "--json", "--no-use-cache")
    ended = run_forked("tools/generate.py", *load, *several)
    assert ended.returncode == 0, ended.stderr
    both = json.loads(ended.stdout)
    assert [row["prompt"] for row in both["texts"]] == ["1 2", "3"] and not both["use_cache"]


def test_what_cannot_be_dumped(folder: Path, tmp_path: Path) -> None:
    from megatron_ponder.errors import DataError

    bad = tmp_path / "bad.npy"
    numpy.save(bad, numpy.array([[1, launch.VOCAB_SIZE]]))
    for path, reason in ((bad, "has ids from 1 to 64"), (tmp_path / "none.npy", "not a .npy file")):
        with pytest.raises(DataError, match=reason):
            evaluate(options(folder, token_ids=str(path), dump_logits=str(tmp_path / "out.npy")))
    assert run_main(flags(load=folder / "run", train_iters=1, data_path=None))[0] == 2
