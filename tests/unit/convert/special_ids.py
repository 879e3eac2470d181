"""Special ids and defaults of generation as folders have them."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig

from tests.unit.convert.conversion import config_of

SPECIAL_IDS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "llama": (
        {"bos_token_id": 1, "eos_token_id": [2, 7, 9], "pad_token_id": 2},
        {"bos_token_id": 1, "eos_token_id": [2, 7, 9], "temperature": 0.6, "do_sample": True},
    ),
    "mistral": ({"bos_token_id": 1, "eos_token_id": 2}, None),
    "qwen2": (
        {"bos_token_id": None, "eos_token_id": 5, "pad_token_id": 6},
        {"eos_token_id": [5, 6], "pad_token_id": 6, "repetition_penalty": 1.1},
    ),
    "qwen3": ({"eos_token_id": 5}, {"eos_token_id": 8}),
    "gpt_neox": ({"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}, None),
    "gpt2": (
        {"task_specific_params": {"text-generation": {"max_length": 50}}, "eos_token_id": 3},
        {"max_new_tokens": 11, "suppress_tokens": [4], "transformers_version": "4.40.0"},
    ),
}
"""By architecture: keys of config.json, absent ones included, and generation_config.json."""
KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "task_specific_params")


def set_ids(folder: Path, keys: dict[str, Any], file: dict[str, Any] | None) -> None:
    """Give a stock folder these keys of config.json, no others, and this generation_config.json."""
    config = {key: value for key, value in config_of(folder).items() if key not in KEYS}
    (folder / "config.json").write_text(json.dumps(config | keys))
    (folder / "generation_config.json").unlink()
    if file is not None:
        (folder / "generation_config.json").write_text(json.dumps(file))


def assert_same_generation(source: Path, result: Path) -> None:
    """The same ids, absent ones included, the same file or none, and the same in transformers."""
    before, after = special_keys(source), special_keys(result)
    assert before == after, (before, after)
    files = [folder / "generation_config.json" for folder in (source, result)]
    contents = [json.loads(file.read_text()) if file.exists() else None for file in files]
    assert contents[0] == contents[1]
    assert defaults_loaded(source) == defaults_loaded(result)


def special_keys(folder: Path) -> dict[str, Any]:
    config = config_of(folder)
    return {key: config[key] for key in KEYS if key in config}


def defaults_loaded(folder: Path) -> dict[str, Any]:
    """What `generate` will do, in transformers' eyes."""
    if (folder / "generation_config.json").exists():
        loaded = GenerationConfig.from_pretrained(folder)
    else:
        loaded = GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder))
    return {k: v for k, v in loaded.to_dict().items() if k != "transformers_version"}
