"""Tokenizer files of an export, as every supported transformers reads them."""

import json
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from megatron_ponder.config.schema import DataConfig
from megatron_ponder.convert.tokenizer_files import write_tokenizer
from megatron_ponder.data.tokenizers import build_tokenizer


def test_a_tokenizer_saved_by_transformers_5_is_read_by_4(tmp_path: Path) -> None:
    """Version 4 knows neither the class nor a list of extra special tokens."""
    source, target = tmp_path / "source", tmp_path / "target"
    for folder in (source, target):
        folder.mkdir()
    built = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "<x>": 2}, unk_token="a"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    built.save(str(source / "tokenizer.json"))
    saved = {
        "backend": "tokenizers",
        "eos_token": "<end>",
        "extra_special_tokens": ["<x>"],
        "tokenizer_class": "TokenizersBackend",
    }
    (source / "tokenizer_config.json").write_text(json.dumps(saved))
    data = DataConfig(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(source))
    write_tokenizer(data, build_tokenizer(data), target)
    config = json.loads((target / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["additional_special_tokens"] == ["<x>"]
    assert "extra_special_tokens" not in config
    assert config["model_input_names"] == ["input_ids", "attention_mask"]
