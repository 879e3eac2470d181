"""The same text gives the same ids and bytes from files and from a dataset, whatever is in it."""

import json
from pathlib import Path

import pytest

from megatron_ponder.config.schema import TokenizerConfig
from megatron_ponder.data.merging import MergeConfig, merge_datasets
from megatron_ponder.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ponder.errors import DataError
from megatron_ponder.inference.options import CheckpointOptions, EvaluateOptions
from megatron_ponder.inference.stream import Stream, read_stream
from tests.unit.data import corpora

END = "<|endoftext|>"
TEXTS = [
    "The \ufb01rst, \u216b \uff21\uff22 and CAF\u00c9",
    "two\n\n lines  \r\n",
    "e\u0301 \u4f60\u597d \U0001f600\U0001f600 \u2581",
    " ",
    *corpora.HARD_TEXTS,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizers, and the same corpus by each of them as a dataset."""
    folder = tmp_path_factory.mktemp("stream")
    plain = corpora.train_json_tokenizer(folder / "plain", END)
    content = json.loads((plain / "tokenizer.json").read_text())
    content["decoder"] = content["pre_tokenizer"]  # ByteLevel
    (plain / "tokenizer.json").write_text(json.dumps(content))
    steps = [{"type": "NFKC"}, {"type": "Lowercase"}]
    content["normalizer"] = {"type": "Sequence", "normalizers": steps}
    (folder / "nfkc").mkdir()
    (folder / "nfkc/tokenizer.json").write_text(json.dumps(content))
    corpora.write_json_lines(folder / "c.jsonl", [*TEXTS, ""])
    for name in ("plain", "nfkc"):
        summary = corpora.run_preprocess(
            str(folder / "c.jsonl"),
            folder / name / "c",
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(folder / name),
            max_rejected=1,
            workers=0,
        )
        assert summary.rejected == {"empty": 1}
    return folder


def tokenizer(folder: Path, name: str) -> Tokenizer:
    return build_tokenizer(
        TokenizerConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder / name))
    )


def read(tokenizer: Tokenizer, *text_file: Path, **settings: object) -> Stream:
    options = EvaluateOptions(
        checkpoint=CheckpointOptions(load="x"), text_file=tuple(map(str, text_file)), **settings
    )
    return read_stream(options, tokenizer, is_text=True)


@pytest.mark.parametrize("name", ["plain", "nfkc"])
def test_bytes_are_those_of_the_original_text(
    name: str, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = tokenizer(folder, name)
    by_file = read(model, folder / "c.jsonl")
    assert "1 documents without any token" in caplog.text
    by_prefix = read(model, data_path=f"{folder}/{name}/c_text_document")
    assert by_file.num_bytes == by_prefix.num_bytes == len("".join(TEXTS).encode())
    assert by_file.ids.tolist() == by_prefix.ids.tolist()
    assert (by_prefix.ids == model.eod).sum() == len(TEXTS) + 1
    merge_datasets(
        MergeConfig(
            input=(f"{folder}/{name}/c_text_document",) * 2, output_prefix=f"{tmp_path}/twice"
        )
    )
    assert read(model, data_path=f"{tmp_path}/twice").num_bytes == 2 * by_file.num_bytes


def test_a_part_ends_between_characters_on_both_ways(folder: Path) -> None:
    model = tokenizer(folder, "plain")
    prefix = f"{folder}/plain/c_text_document"
    whole = read(model, folder / "c.jsonl")
    for limit in range(1, len(whole.ids) + 2):
        by_file = read(model, folder / "c.jsonl", max_tokens=limit)
        by_prefix = read(model, data_path=prefix, max_tokens=limit)
        assert by_file.num_bytes == by_prefix.num_bytes
        assert by_file.ids.tolist() == by_prefix.ids.tolist()
        ids = by_file.ids.tolist()
        assert ids == whole.ids.tolist()[: len(ids)] and limit - 3 <= len(ids) - 1 <= limit
        text = model.detokenize([i for i in ids if i != model.eod])
        assert "\ufffd" not in text and by_file.num_bytes == len(text.encode())
    assert by_file.num_bytes == whole.num_bytes


def test_bytes_that_are_not_known_are_left_out(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A part of a text, or a dataset without a manifest of its own, of a tokenizer that changes."""
    expected = len("".join(TEXTS).encode())
    for name in ("plain", "nfkc"):
        model, original = tokenizer(folder, name), f"{folder}/{name}/c_text_document"
        for suffix in ("bin", "idx"):
            content = Path(f"{original}.{suffix}").read_bytes()
            (tmp_path / f"{name}.{suffix}").write_bytes(content)
        copied = read(model, data_path=f"{tmp_path}/{name}")
        known = expected if name == "plain" else None
        assert copied.num_bytes == known
        manifest = json.loads(Path(f"{folder}/{name}/c.manifest.json").read_text())
        entry = manifest["datasets"].pop("c_text_document")
        manifest["datasets"][name] = {**entry, "bin_sha256": "0"}
        (tmp_path / f"{name}.manifest.json").write_text(json.dumps(manifest))
        assert read(model, data_path=f"{tmp_path}/{name}").num_bytes == known
        manifest["datasets"][name] = entry
        (tmp_path / f"{name}.manifest.json").write_text(json.dumps(manifest))
        assert read(model, data_path=f"{tmp_path}/{name}").num_bytes == expected
    for settings in ({"data_path": original}, {"text_file": (f"{folder}/c.jsonl",)}):
        options = EvaluateOptions(checkpoint=CheckpointOptions(load="x"), max_tokens=9, **settings)
        assert read_stream(options, model, is_text=True).num_bytes is None
    assert (
        "no manifest of these files" in caplog.text and "--max-tokens scores a part" in caplog.text
    )


def test_data_without_end_ids_is_named(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    corpora.run_preprocess(
        str(folder / "c.jsonl"), tmp_path / "c", append_eod=False, max_rejected=1, workers=0,
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder / "plain"),
    )  # fmt: skip
    assert "without --append-eod nothing marks the end" in caplog.text
    read(tokenizer(folder, "plain"), data_path=f"{tmp_path}/c_text_document")
    assert f"{len(TEXTS)} of {len(TEXTS)} documents looked at do not end" in caplog.text


def test_a_text_without_tokens_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="there is no text to score"):
        read(tokenizer(folder, "plain"), tmp_path / "a.txt")
