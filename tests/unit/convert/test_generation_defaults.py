"""Special ids, defaults of generation and tokenizer files survive an import and an export.

The round trips of all architectures are in test_round_trip.py.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_ponder.checkpoint.reader import locate
from megatron_ponder.checkpoint.stored_config import read_config
from megatron_ponder.config.parse import parse_args
from megatron_ponder.config.schema import DataConfig
from megatron_ponder.convert.generation_defaults import build_generation_files
from megatron_ponder.convert.tokenizer_files import write_tokenizer
from megatron_ponder.data.tokenizers import build_tokenizer
from megatron_ponder.errors import ConversionError
from tests.unit.convert.conversion import alone, convert_well
from tests.unit.convert.special_ids import SPECIAL_IDS, assert_same_generation, set_ids
from tests.unit.convert.stock_models import LLAMA
from tests.unit.data import corpora


def with_tokenizer(folder: Path) -> None:
    """Thoughts added, trained on by its own run_config.yaml, and everything is as it was."""
    source, checkpoint = folder / "source", folder / "checkpoint"
    corpora.train_json_tokenizer(source, "<|endoftext|>")
    described = {"eos_token": "<|endoftext|>", "bos_token": "a", "add_bos_token": True}
    files = {
        "tokenizer_config.json": json.dumps(described),
        "special_tokens_map.json": json.dumps({"bos_token": "a"}),
        "chat_template.jinja": "{{ messages }}",
    }
    for name, text in files.items():
        (source / name).write_text(text)
    LlamaForCausalLM(LlamaConfig(**LLAMA | {"vocab_size": 310})).save_pretrained(source)
    set_ids(source, *SPECIAL_IDS["llama"])
    flags = ("--hf-path", str(source), "--save", str(checkpoint), "--method", "ponderlm2")
    convert_well("import", *flags, "--no-verify")
    stored = locate(checkpoint)
    run = parse_args(["--config", str(stored / "run_config.yaml")], "pretrain")
    assert run.model.generation_defaults == read_config(stored).model.generation_defaults
    result = folder / "result"
    convert_well("export", "--load", str(checkpoint), "--hf-path", str(result), "--no-verify")
    for name in ("special_tokens_map.json", "chat_template.jinja", "generation_config.json"):
        before, after = (source / name).read_text(), (result / name).read_text()
        assert after == before or json.loads(after) == json.loads(before), name
    written = json.loads((result / "tokenizer_config.json").read_text())
    assert {key: written[key] for key in ("bos_token", "eos_token")} == {
        key: described[key] for key in ("bos_token", "eos_token")
    }
    assert_same_generation(source, result)


@pytest.mark.thorough
def test_a_folder_with_its_tokenizer(tmp_path: Path) -> None:
    alone(with_tokenizer, tmp_path)


def test_a_folder_with_a_sentencepiece_model(tmp_path: Path) -> None:
    """Its names of special tokens stay, but for those that the model does not have."""
    path = Path(corpora.train_tokenizer(tmp_path))
    data = DataConfig(tokenizer_model=str(path))
    built = build_tokenizer(data)
    plain, named = tmp_path / "plain", tmp_path / "named"
    write_tokenizer(data, built, plain)
    before = json.loads((plain / "tokenizer_config.json").read_text())
    stated = {"bos_token": {"content": "a"}, "pad_token": None, "unk_token": "<other>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(stated))
    write_tokenizer(data, built, named)
    after = json.loads((named / "tokenizer_config.json").read_text())
    assert after == before | {"bos_token": "a", "pad_token": None}
    assert before["bos_token"] == before["eos_token"] != "a"


def tokenizer(end: int, begin: tuple[int, ...] = ()) -> Any:
    """What is asked of a tokenizer."""
    return SimpleNamespace(eod=end, begin=begin)


def gradient_of_row(row: int, **ids: Any) -> float:
    """Largest gradient of a token's embedding in a stock Llama."""
    torch.manual_seed(1)
    shape = {"vocab_size": 20, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, **ids))
    tokens = torch.tensor([[3, row, 4, 5]])
    model(input_ids=tokens, labels=tokens).loss.backward()
    return float(model.get_input_embeddings().weight.grad[row].abs().max())


def test_the_end_of_document_is_trained_again() -> None:
    """A run that began here exports no padding in config.json: stock classes freeze that row."""
    keys, generation = build_generation_files(None, tokenizer(7))
    assert generation is not None
    assert keys == {"bos_token_id": 7, "eos_token_id": 7, "pad_token_id": None}
    assert build_generation_files(None, tokenizer(7, (4,)))[0]["bos_token_id"] == 4
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (7, 7)
    assert gradient_of_row(7, **keys) > 0
    assert gradient_of_row(7, **keys | {"pad_token_id": 7}) == 0


def test_what_disagrees_is_said(caplog: pytest.LogCaptureFixture) -> None:
    stored = json.dumps({"config": {"eos_token_id": [2, 3], "pad_token_id": 2}, "file": None})
    keys, generation = build_generation_files(stored, tokenizer(7))
    assert generation is None and keys["eos_token_id"] == [2, 3]
    assert "the tokenizer ends documents with 7" in caplog.text
    assert "never train the embedding of pad_token_id" in caplog.text
    caplog.clear()
    build_generation_files(stored.replace('"pad_token_id": 2', '"x": 2'), tokenizer(3))
    assert not caplog.text
    with pytest.raises(ConversionError, match="--generation-defaults '5'"):
        build_generation_files("5", None)
