"""One tokenizer from data to generation: any other is refused, and its choices hold everywhere."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ponder.inference import generation
from megatron_ponder.inference.evaluation import evaluate
from megatron_ponder.inference.generation import run
from megatron_ponder.inference.loading import loaded_model
from megatron_ponder.inference.options import (
    CheckpointOptions,
    EvaluateOptions,
    GenerateOptions,
    SamplingOptions,
)
from tests.commands import run_forked
from tests.e2e import launch
from tests.ranks import RanksFailed, run_ranks
from tests.unit.data import corpora
from tests.unit.data.json_tokenizers import END, OTHER, begins_with, build, content, write

TEXTS = [f"bak dom {END} gel", *corpora.texts(20)]
NUM_ROWS, NUM_IDS = 1024, 300
CHOICES = {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_hf_include_special_tokens": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, data and a run of two iterations, with more rows than the tokenizer has ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = write(folder / "tokenizer", content(post_processor=begins_with(OTHER, 1)))
    corpus = corpora.write_json_lines(folder / "corpus.jsonl", TEXTS)
    for name, choices in (("data", CHOICES), ("plain", {"tokenizer_type": "HuggingFaceTokenizer"})):
        corpora.run_preprocess(corpus, folder / name, tokenizer_model=str(tokenizer), **choices)
    printed = launch.train(arguments(folder, train_iters=2, save=folder / "run"))
    assert f"vocabulary: {NUM_ROWS - NUM_IDS} of {NUM_ROWS} rows belong to no token" in printed
    assert "end of document 0, begin 1" in printed
    return folder


def arguments(folder: Path, **settings: Any) -> list[str]:
    given = {
        **CHOICES,
        "vocab_size": NUM_ROWS,
        "tokenizer_model": folder / "tokenizer",
        "data_path": folder / "data_text_document",
        "split": "100,0,0",
        "eval_iters": 0,
        "lr_warmup_iters": 0,
    }
    return launch.flags(**given | settings)


def checkpoint(folder: Path, **options: str) -> CheckpointOptions:
    return CheckpointOptions(load=str(folder / "run"), **options)


def score(folder: Path, **inputs: Any) -> dict[str, Any]:
    return run_ranks(evaluate, 1, EvaluateOptions(checkpoint=checkpoint(folder), **inputs))[0]


def continued(options: GenerateOptions) -> dict[str, Any]:
    return run(options, lambda _: None)


def ids_of(options: GenerateOptions) -> tuple[list[list[int]], list[int]]:
    """Ids of the prompts, and all that are drawn."""
    with loaded_model(options.checkpoint) as loaded:
        tokenizer = loaded.tokenizer()
        texts = generation._start(loaded, tokenizer, options.prompt, options.sampling)
        drawn = [token for _, token in generation._generate(loaded, tokenizer, texts, options)]
        return [text.prompt.tolist() for text in texts], drawn


def test_data_and_text_are_the_same_stream(folder: Path) -> None:
    by_data = score(folder, data_path=str(folder / "data_text_document"))
    by_text = score(folder, text_file=(str(folder / "corpus.jsonl"),))
    for name in ("loss", "num_tokens", "num_bytes"):
        assert by_data[name] == by_text[name]
    assert by_data["num_bytes"] == sum(len(text.encode()) for text in TEXTS)


def test_generation_begins_as_documents_do_and_draws_tokens_only(folder: Path) -> None:
    options = GenerateOptions(
        checkpoint=checkpoint(folder),
        prompt=("", "bak", END),
        sampling=SamplingOptions(temperature=1000.0, max_new_tokens=30),
    )
    prompts, drawn = run_ranks(ids_of, 1, options)[0]
    tokenizer = build(folder / "tokenizer")
    assert prompts == [[1, *tokenizer.tokenize(text)] for text in options.prompt]
    assert len(drawn) > 30 and max(drawn) < NUM_IDS


def test_another_tokenizer_is_refused_everywhere(folder: Path) -> None:
    other = write(folder / "other", content(), {"eos_token": OTHER})
    plain = {"tokenizer_hf_include_special_tokens": False}
    for changes, named in (
        ({"tokenizer_model": other}, "eod 1"),
        (plain, "begin 1"),
        ({"parse_special_tokens": True}, "special tokens in text parsed"),
    ):
        code, _, err = launch.run_main(arguments(folder, **{"train_iters": 3, **changes}))
        assert code == 2 and "made with another tokenizer" in err and named in err, err
        assert "data.manifest.json" in err and "--override-data" in err
    resumed = {"load": folder / "run", "data_path": folder / "plain_text_document"}
    resumed["train_iters"] = 3
    code, _, err = launch.run_main(arguments(folder, **plain, **resumed))
    assert code == 2 and "tokenizer: " in err and "on other data" in err, err
    with pytest.raises(RanksFailed, match="plain_text_document was made with another tokenizer"):
        score(folder, data_path=str(folder / "plain_text_document"))
    inputs = {"text_file": (str(folder / "corpus.jsonl"),)}
    moved = EvaluateOptions(checkpoint=checkpoint(folder, tokenizer_model=str(other)), **inputs)
    with pytest.raises(RanksFailed, match="trained with another tokenizer.* eod 0.* eod 1"):
        run_ranks(evaluate, 1, moved)
    prompted = GenerateOptions(checkpoint=moved.checkpoint, prompt=("a",))
    with pytest.raises(RanksFailed, match="trained with another tokenizer"):
        run_ranks(continued, 1, prompted)
    ended = run_forked(
        "tools/convert_checkpoint.py", "export", "--load", folder / "run",
        "--tokenizer-model", other, "--hf-path", folder / "exported",
    )  # fmt: skip
    assert ended.returncode == 2 and "trained with another tokenizer" in ended.stderr, ended.stderr
    code, out, err = launch.run_main(arguments(folder, **resumed, **plain, override_data=True))
    assert code == 0, err


def test_the_manifest_names_the_tokenizer(folder: Path) -> None:
    manifest = json.loads((folder / "data.manifest.json").read_text())
    assert manifest["tokenizer_model"] == str(folder / "tokenizer")
    assert manifest["tokenizer"]["eod"] == 0 and manifest["tokenizer"]["begin"] == "1"


def test_the_row_of_the_pause_token_moves_no_end_id(tmp_path: Path) -> None:
    """Without a tokenizer the last row ends documents; the pause token's is one more."""
    data = {"data_path": launch.write_dataset(tmp_path), "eval_iters": 0, "lr_warmup_iters": 0}
    method = {"method": "pause", "num_latent_thoughts": 1}
    printed = launch.train(launch.flags(**data, **method, train_iters=1, save=tmp_path / "run"))
    assert f"end of document {launch.VOCAB_SIZE - 1}" in printed
    assert f"1 of {launch.VOCAB_SIZE + 1} rows belong to no token" in printed
    assert score(tmp_path, data_path=data["data_path"])["num_tokens"] > 0
