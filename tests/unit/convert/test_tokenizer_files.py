"""Exported tokenizers give the run's ids; an import begins texts as its source does."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_ponder.config.schema import DataConfig
from megatron_ponder.convert.tokenizer_files import find_tokenizer, write_tokenizer
from megatron_ponder.data.tokenizers import build_tokenizer
from tests.unit.data.json_tokenizers import END, OTHER, added, begins_with, content, write
from tests.unit.data.test_special_tokens import STORED

TEXT = f"bak {END} dom{OTHER}<|far|></s><s> gel"
HF: dict[str, Any] = {"tokenizer_type": "HuggingFaceTokenizer"}
FAR = [*content()["added_tokens"], added("<|far|>", 1000)]
BEGINS = content(post_processor=begins_with(OTHER, 1), added_tokens=FAR)


@pytest.mark.parametrize(
    ("tokenizer", "config", "choices"),
    [
        (content(added_tokens=FAR, **STORED["truncation"]), None, HF),
        (content(**STORED["padding"]), {"model_max_length": 7}, HF),
        (content(added_tokens=[added(END, 0, special=False)]), {"eos_token": END}, HF),
        (BEGINS, {"add_bos_token": True, "tokenizer_class": "LlamaTokenizer"}, HF),
        (BEGINS, None, {**HF, "tokenizer_hf_include_special_tokens": True}),
        (BEGINS, None, {**HF, "parse_special_tokens": True}),
        (content(), {"bos_token": OTHER, "eos_token": END}, {**HF, "add_bos": True}),
        (None, None, {}),
        (None, None, {"add_bos": True}),
    ],
)
def test_an_export_gives_the_ids_of_the_run(
    tokenizer: dict[str, Any] | None,
    config: dict[str, Any] | None,
    choices: dict[str, Any],
    tmp_path: Path,
    tokenizer_model: str,
) -> None:
    path = tokenizer_model if tokenizer is None else write(tmp_path / "run", tokenizer, config)
    data = DataConfig(tokenizer_model=str(path), **choices)
    ours = build_tokenizer(data)
    write_tokenizer(data, ours, tmp_path / "exported")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "exported")
    expected = [*ours.begin, *ours.tokenize(TEXT)]
    assert theirs(TEXT)["input_ids"] == theirs.encode(TEXT) == expected
    assert theirs([TEXT, "a"])["input_ids"][0] == expected
    assert theirs.eos_token_id == ours.eod and set(theirs(TEXT)) == {"input_ids", "attention_mask"}
    assert not ours.begin or theirs.bos_token_id == ours.begin[0]
    assert theirs.decode(ours.tokenize(TEXT)) == TEXT
    # A second export is the same again.
    if tokenizer is not None:
        data = DataConfig(tokenizer_model=str(tmp_path / "exported"), **choices)
        assert build_tokenizer(data).tokenize(TEXT) == ours.tokenize(TEXT)


def test_a_chat_template_needs_special_tokens_in_text(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = "{{ messages[0]['content'] }}<|im_end|>"
    path = write(tmp_path / "run", content(), {"chat_template": template})
    data = DataConfig(tokenizer_model=str(path), **HF)
    write_tokenizer(data, build_tokenizer(data), tmp_path / "exported")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "exported")
    chat = theirs.apply_chat_template([{"role": "user", "content": "a"}])
    assert (chat if isinstance(chat, list) else chat["input_ids"])[-1] == 1
    assert 1 not in theirs("a<|im_end|>", split_special_tokens=True)["input_ids"]
    assert "split_special_tokens=True" in caplog.text


def test_an_import_begins_texts_as_its_source_does(tmp_path: Path) -> None:
    for name, post_processor, begins in (
        ("plain", None, False),
        ("begins", begins_with(OTHER, 1), True),
        (
            "ends",
            {**begins_with(OTHER, 1), "single": BEGINS["post_processor"]["single"][::-1]},
            False,
        ),
    ):
        folder = write(tmp_path / name, content(post_processor=post_processor))
        found = find_tokenizer(folder, 300, None, None)
        assert found is not None
        assert found.settings["tokenizer_hf_include_special_tokens"] is begins
        built = build_tokenizer(DataConfig(**found.settings))
        assert built.begin == ((1,) if begins else ())


def test_what_describes_a_tokenizer_is_kept(tmp_path: Path) -> None:
    stated = {
        "eos_token": {"content": OTHER, "special": True},
        "pad_token": END,
        "padding_side": "left",
    }
    path = write(tmp_path / "run", content(), stated)
    data = DataConfig(tokenizer_model=str(path), **HF)
    write_tokenizer(data, build_tokenizer(data), tmp_path / "exported")
    kept = json.loads((tmp_path / "exported" / "tokenizer_config.json").read_text())
    assert {key: kept[key] for key in stated} == stated
    source, copy = (folder / "tokenizer.json" for folder in (path, tmp_path / "exported"))
    assert source.read_bytes() == copy.read_bytes()


def test_a_tokenizer_saved_by_transformers_5_is_read_by_4(tmp_path: Path) -> None:
    """Version 4 knows neither the class nor a list of extra special tokens."""
    saved = {
        "backend": "tokenizers",
        "eos_token": END,
        "extra_special_tokens": [OTHER],
        "tokenizer_class": "TokenizersBackend",
    }
    source, target = write(tmp_path / "source", content(), saved), tmp_path / "target"
    target.mkdir()
    data = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(source))
    write_tokenizer(data, build_tokenizer(data), target)
    config = json.loads((target / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == [OTHER]
    assert "extra_special_tokens" not in config
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
