"""Damaged Hugging Face folders: each is imported, or refused with a message.

Some are compared with what transformers makes of the folder, which is most of the time.
"""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_ponder.convert.importing import import_checkpoint
from megatron_ponder.convert.options import ImportOptions
from tests import fuzz
from tests.unit.convert.conversion import alone, config_of, stored_weights
from tests.unit.convert.special_ids import SPECIAL_IDS, set_ids
from tests.unit.convert.test_config_mapping import AUTHORS

pytestmark = pytest.mark.slow

SHARE_COMPARED = 0.2
SHAPE = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 8,
}
GPT2_SHAPE = {"vocab_size": 11, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}


def write_sources(folder: Path) -> dict[Path, str]:
    """A folder for each architecture, and one with thoughts; their config files by path."""
    for architecture, ids in SPECIAL_IDS.items():
        shape = GPT2_SHAPE if architecture == "gpt2" else SHAPE
        if architecture == "gpt_neox":
            shape = {key: value for key, value in shape.items() if key != "num_key_value_heads"}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **shape))
        model.save_pretrained(folder / architecture)
        set_ids(folder / architecture, *ids)
    thoughts = folder / "thoughts"
    shutil.copytree(folder / "llama", thoughts)
    keys = AUTHORS | {"method": "ponderlm2"}
    (thoughts / "config.json").write_text(json.dumps(config_of(thoughts) | keys))
    return {path: path.read_text() for path in sorted(folder.glob("*/*config.json"))}


def read(mutant: tuple[Path, bool]) -> None:
    """Import a folder, and forget the result."""
    source, verify = mutant
    save = source.parent / "result"
    shutil.rmtree(save, ignore_errors=True)
    import_checkpoint(ImportOptions(hf_path=str(source), save=str(save), verify=verify))


def configs(folder: Path, seed: int) -> Counter[str]:
    originals = write_sources(folder)
    for path in originals:
        read((path.parent, True))

    def damage(draw: random.Random) -> tuple[str, tuple[Path, bool]]:
        for path, text in originals.items():
            path.write_text(text)
        is_main = draw.random() < 0.9
        path = draw.choice([path for path in originals if (path.name == "config.json") == is_main])
        text = originals[path]
        if draw.random() < 0.7:
            kind, value = fuzz.damaged_value(json.loads(text), draw)
            content = json.dumps(value).encode()
        else:
            kind, content = fuzz.damaged_bytes(text.encode(), draw)
        path.write_bytes(content)
        verify = draw.random() < SHARE_COMPARED
        return f"{path.relative_to(folder)}, {kind}", (path.parent, verify)

    return fuzz.survive(read, damage, seed=seed)


def test_configs(tmp_path: Path) -> None:
    """config.json of every architecture, generation_config.json, the authors' keys."""
    outcomes = alone(configs, tmp_path, 1)
    assert outcomes["read"] > 50 and outcomes["refused"] > 200, outcomes


def headers(folder: Path, seed: int) -> Counter[str]:
    write_sources(folder)
    source = folder / "llama"
    path = source / "model.safetensors"
    original = path.read_bytes()
    length = int.from_bytes(original[:8], "little")
    header, data = original[8 : 8 + length], original[8 + length :]

    def damage(draw: random.Random) -> tuple[str, tuple[Path, bool]]:
        way = draw.choice(("value", "text", "bytes"))
        if way == "bytes":
            kind, content = fuzz.damaged_bytes(original[: 8 + length], draw)
        else:
            if way == "value":
                kind, value = fuzz.damaged_value(json.loads(header), draw)
                text = json.dumps(value).encode()
            else:
                kind, text = fuzz.damaged_bytes(header, draw)
            content = len(text).to_bytes(8, "little") + text
        path.write_bytes(content + data)
        return f"{way}, {kind}", (source, draw.random() < SHARE_COMPARED)

    return fuzz.survive(read, damage, seed=seed)


def test_headers(tmp_path: Path) -> None:
    """Of safetensors files."""
    outcomes = alone(headers, tmp_path, 1)
    assert outcomes["refused"] > 200, outcomes


def other_weights(folder: Path, seed: int) -> Counter[str]:
    write_sources(folder)
    source = folder / "llama"
    weights = stored_weights(source)
    (source / "model.safetensors").unlink()
    names = sorted(weights)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: weights[name] for name in part}, source / f"{number}.safetensors")
    index = source / "model.safetensors.index.json"
    weight_map = {name: f"{number % 2}.safetensors" for number, name in enumerate(names)}
    whole = source / "pytorch_model.bin"
    torch.save(weights, whole)
    original = whole.read_bytes()

    def damage(draw: random.Random) -> tuple[str, tuple[Path, bool]]:
        if draw.random() < 0.5:
            kind, value = fuzz.damaged_value({"metadata": {}, "weight_map": weight_map}, draw)
            index.write_text(json.dumps(value))
            return f"index, {kind}", (source, False)
        index.unlink(missing_ok=True)
        kind, content = fuzz.damaged_bytes(original, draw)
        whole.write_bytes(content)
        return f"bin, {kind}", (source, False)

    return fuzz.survive(read, damage, seed=seed)


def test_indexes_and_bin_files(tmp_path: Path) -> None:
    """Of several safetensors files; and what torch reads without running code."""
    outcomes = alone(other_weights, tmp_path, 1)
    assert outcomes["refused"] > 200, outcomes
