"""What training does with data: refuses another one on resume, and takes every kind there is."""

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ponder.data.preprocess import PreprocessConfig, preprocess
from tests.e2e import launch
from tests.e2e.launch import flags, run_main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets, conversations, and a checkpoint after two iterations on the first."""
    folder = tmp_path_factory.mktemp("loading")
    for name in ("one", "two"):
        (folder / name).mkdir()
        launch.write_dataset(folder / name)
    corpus = folder / "two" / "corpus.jsonl"
    corpus.write_text(corpus.read_text().replace("1", "2"))
    preprocess(
        PreprocessConfig(
            input=(str(corpus),),
            output_prefix=str(folder / "two" / "other"),
            tokenizer_type="NullTokenizer",
            vocab_size=launch.VOCAB_SIZE,
            append_eod=True,
            workers=0,
        )
    )
    code, _, err = run_main(flags(**base(folder), train_iters=2, save=folder / "run"))
    assert code == 0, err
    return folder


def base(folder: Path) -> dict[str, Any]:
    return {
        "data_path": folder / "one" / "corpus_text_document",
        "lr_warmup_iters": 0,
        "eval_iters": 0,
    }


def resume(folder: Path, **changes: Any) -> tuple[int, str, str]:
    settings = {**base(folder), "train_iters": 3, "load": folder / "run", **changes}
    return run_main(flags(**settings))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"data_path": "{folder}/two/other_text_document"}, "data: "),
        ({"split": "80,20,0"}, "split: 90,10,0 in the checkpoint, 80,20,0 now"),
        ({"seq_length": 16, "max_position_embeddings": 32}, "seq length: 32 in the checkpoint, 16"),
        ({"seed": 5}, "seed: 1234 in the checkpoint, 5 now"),
        ({"vocab_size": 63}, "made with another tokenizer: with NullTokenizer [vocab size 64, "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_data_is_refused_unless_told_otherwise(
    changes: dict[str, Any], told: str, folder: Path
) -> None:
    given = {
        name: value.format(folder=folder) if isinstance(value, str) else value
        for name, value in changes.items()
    }
    code, out, err = resume(folder, **given)
    if "vocab_size" in changes:  # its end id is not that of the data
        given["vocab_size"] = launch.VOCAB_SIZE - 1
    assert code == 2 and told in err and "--override-data" in err, err
    assert "Traceback" not in err
    if "vocab_size" not in changes:
        code, out, err = resume(folder, **given, override_data=True)
        assert code == 0, err
        assert f"--override-data: the data is not the checkpoint's: {told}" in out
    code, _, err = resume(folder, **given, finetune=True)
    assert code == (2 if "vocab_size" in changes else 0), err


def test_the_same_data_elsewhere_resumes(folder: Path) -> None:
    moved = folder / "moved"
    moved.mkdir()
    for suffix in (".bin", ".idx"):
        content = (folder / "one" / f"corpus_text_document{suffix}").read_bytes()
        (moved / f"renamed{suffix}").write_bytes(content)
    code, out, err = resume(folder, data_path=moved / "renamed", num_workers=1)
    assert code == 0, err
    assert "loaded checkpoint" in out


def test_validation_sets_are_reported_by_name(folder: Path) -> None:
    paths = [folder / "one" / "corpus_text_document", folder / "two" / "other_text_document"]
    arguments = flags(
        lr_warmup_iters=0,
        train_iters=2,
        eval_interval=1,
        save=folder / "validated",
        tensorboard_dir=folder / "board",
        multiple_validation_sets=True,
    )
    arguments += ["--train-data-path", str(paths[0]), "--valid-data-path", *map(str, paths)]
    code, out, err = run_main(arguments)
    assert code == 0, err
    found = launch.records(folder / "validated", "valid")
    names = ["corpus_text_document", "other_text_document"]
    told = [(record["iteration"], record["dataset"]) for record in found]
    assert told == [(i, n) for i in (1, 2) for n in names]
    assert len({r["lm_loss"] for r in found}) == 4
    assert "validation (other_text_document) loss at iteration 2" in out


def test_masks_leave_tokens_out_of_the_loss(folder: Path) -> None:
    counts = []
    for number, masks in enumerate(
        ({}, {"eod_mask_loss": True}, {"eod_as_target": False}, {"reset_position_ids": True})
    ):
        settings = {**base(folder), "train_iters": 1, "save": folder / f"masks{number}", **masks}
        code, _, err = run_main(flags(**settings))
        if "reset_position_ids" in masks:
            assert code == 2 and "--reset-position-ids: attention here sees the whole" in err
        else:
            assert code == 0, err
            (record,) = launch.records(folder / f"masks{number}", "train")
            counts.append(record["consumed_tokens"])
    assert counts[0] == 8 * 32 and counts[1] < counts[0] and counts[2] < counts[0]


def test_instruction_data_trains_on_responses_only(folder: Path) -> None:
    corpus = folder / "chat.jsonl"
    with corpus.open("w") as file:
        for i in range(30):
            file.write(json.dumps({"prompt": f"{i} 1 2", "response": f"{i} {i + 1}"}) + "\n")
    prefix = folder / "chat"
    model = write_word_tokenizer(folder)
    preprocess(
        PreprocessConfig(
            input=(str(corpus),),
            output_prefix=str(prefix),
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=model,
            instruction_data=True,
            workers=0,
        )
    )
    settings = {
        **base(folder),
        "data_path": f"{prefix}_instruction_document",
        "instruction_data": True,
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": model,
        "train_iters": 2,
        "eval_iters": 1,
        "save": folder / "chat_run",
    }
    code, _, err = run_main(flags(**settings))
    assert code == 0, err
    (record, _) = launch.records(folder / "chat_run", "train")
    # A conversation has 12 ids, of which the response and its end, 3, are learned; two of them fit
    # into a sequence, and the last one of a repetition may be alone.
    assert 8 * 3 <= record["consumed_tokens"] <= 8 * 6 and record["consumed_tokens"] % 3 == 0
    other = {"data_path": base(folder)["data_path"], "save": None}
    code, _, err = run_main(flags(**{**settings, **other}))
    assert code == 2 and "instruction_document" in err


def write_word_tokenizer(folder: Path) -> str:
    """A tokenizer of 60 words."""
    words = ["<eos>", "unk", "#", ":", "Instruction", "Response", *map(str, range(50))]
    model = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": {"type": "Whitespace"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate(words)},
            "unk_token": "unk",
        },
    }
    path = folder / "words.json"
    path.write_text(json.dumps(model))
    return str(path)
