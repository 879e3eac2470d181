"""Damaged tokenizer files are read or refused, never a traceback, a hang or a giant buffer."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_ponder.config.schema import TokenizerConfig, TokenizerType
from megatron_ponder.data.tokenizers import build_tokenizer
from megatron_ponder.data.word_cache import word_cached
from tests.fuzz import damaged_file, damaged_value, survive
from tests.unit.data import json_tokenizers
from tests.unit.data.corpora import HARD_TEXTS
from tests.unit.data.json_tokenizers import END, OTHER
from tests.unit.data.test_special_tokens import tiktoken_vocabulary

pytestmark = pytest.mark.slow
TEXTS = [*HARD_TEXTS, f"{END}</s><unk>", "bak dom\u2581", ""]
JSON_FILES = {
    "bpe": json_tokenizers.content(post_processor=json_tokenizers.begins_with(OTHER, 1)),
    "unigram": json_tokenizers.unigram(),
    "word level": json_tokenizers.word_level(),
}
CONFIG = {
    "eos_token": END,
    "bos_token": {"content": OTHER, "lstrip": False, "special": True},
    "pad_token": None,
    "added_tokens_decoder": {"0": {"content": END, "special": True}},
    "model_max_length": 1e30,
}


def read(kind: TokenizerType, path: Path) -> None:
    """Load it, and use it as preprocessing and generation do."""
    tokenizer = build_tokenizer(TokenizerConfig(tokenizer_type=kind, tokenizer_model=str(path)))
    assert 0 <= tokenizer.eod < tokenizer.vocab_size and len(tokenizer.token_ids()) > 0
    for text, ids in zip(TEXTS, tokenizer.tokenize_batch(TEXTS), strict=True):
        assert all(0 <= token < tokenizer.vocab_size for token in ids)
        tokenizer.detokenize([*ids, tokenizer.eod])
        tokenizer.losses(text, ids)


def damaged_json(original: object, path: Path) -> Callable[[random.Random], tuple[str, Path]]:
    """Damage to the bytes of a file, or to what its JSON holds."""
    content = json.dumps(original, ensure_ascii=False).encode()

    def damage(draw: random.Random) -> tuple[str, Path]:
        if draw.random() < 0.3:
            return damaged_file(content, path, draw)
        kind, value = damaged_value(original, draw)
        keys = {"skipkeys": True}  # some damage makes keys that JSON does not have
        path.write_bytes(json.dumps(value, **keys).encode())
        return kind, path

    return damage


@pytest.mark.parametrize("kind", JSON_FILES)
def test_tokenizer_json(kind: str, tmp_path: Path) -> None:
    damage = damaged_json(JSON_FILES[kind], tmp_path / "tokenizer.json")
    found = survive(lambda path: read("HuggingFaceTokenizer", path), damage, seed=1)
    assert min(found["read"], found["refused"]) > 20


def test_tokenizer_config_json(tmp_path: Path) -> None:
    json_tokenizers.write(tmp_path, json_tokenizers.content())
    damage = damaged_json(CONFIG, tmp_path / "tokenizer_config.json")
    found = survive(lambda path: read("HuggingFaceTokenizer", path.parent), damage, seed=2)
    assert min(found["read"], found["refused"]) > 20


def test_sentencepiece_models(tokenizer_model: str, tmp_path: Path) -> None:
    content, path = Path(tokenizer_model).read_bytes(), tmp_path / "t.model"

    def use(path: Path) -> None:
        read("SentencePieceTokenizer", path)
        plain = build_tokenizer(TokenizerConfig(tokenizer_model=str(path)))
        assert word_cached(plain, path).tokenize(TEXTS[0]) == plain.tokenize(TEXTS[0])

    found = survive(use, lambda draw: damaged_file(content, path, draw), seed=3, count=2000)
    assert min(found["read"], found["refused"]) > 10


@pytest.mark.parametrize("name", ["t.json", "t.tiktoken"])
def test_tiktoken_vocabularies(name: str, tmp_path: Path) -> None:
    path = Path(tiktoken_vocabulary(tmp_path))
    if name == "t.json":
        damage = damaged_json(json.loads(path.read_text()), path)
    else:
        content = (tmp_path / name).read_bytes()

        def damage(draw: random.Random) -> tuple[str, Path]:
            return damaged_file(content, tmp_path / name, draw)[0], path

    found = survive(lambda _: read("TikTokenizer", path), damage, seed=4)
    assert found["refused"] > 20
