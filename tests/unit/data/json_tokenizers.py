"""Small tokenizer.json files, as the field has them: with stored settings, gaps, begin tokens."""

import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megatron_ponder.config.schema import TokenizerConfig
from megatron_ponder.data.tokenizers import HuggingFaceTokenizer, build_tokenizer
from tests.unit.data import corpora

END, OTHER = "<|endoftext|>", "<|im_end|>"


@functools.cache
def _trained() -> str:
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END, OTHER],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(corpora.texts(), trainer)
    return model.to_str()


def content(**changes: Any) -> dict[str, Any]:
    """A byte-level BPE with two special tokens, 0 and 1, and top-level keys changed."""
    return json.loads(_trained()) | changes


def added(name: str, number: int, *, special: bool = True) -> dict[str, Any]:
    """An entry of added_tokens."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": name, "special": special, **flags}


def write(folder: Path, tokenizer: dict[str, Any], config: Any = None) -> Path:
    """A folder with both files; without tokenizer_config.json if there is no config."""
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def build(folder: Path, **choices: Any) -> HuggingFaceTokenizer:
    """The tokenizer in a folder."""
    settings = TokenizerConfig(
        tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(folder), **choices
    )
    tokenizer = build_tokenizer(settings)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer


def unigram(special: str = "</s>") -> dict[str, Any]:
    """A unigram model whose vocabulary holds a special token as likely as any piece."""
    pieces = [["<unk>", 0.0], [special, 0.0], *([c, -3.0] for c in "</s>ab ")]
    return content(
        model={"type": "Unigram", "unk_id": 0, "vocab": pieces, "byte_fallback": False},
        added_tokens=[added("<unk>", 0), added(special, 1)],
        pre_tokenizer=None,
        decoder={"type": "Fuse"},
    )


def word_level() -> dict[str, Any]:
    """A model whose words are in its vocabulary, special tokens among them."""
    vocab = {"<unk>": 0, "</s>": 1, "a": 2, "b": 3}
    return content(
        model={"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"},
        added_tokens=[added("<unk>", 0), added("</s>", 1)],
        pre_tokenizer={"type": "WhitespaceSplit"},
        decoder=None,
    )


def begins_with(name: str, number: int) -> dict[str, Any]:
    """A post-processor that puts a token before each text."""
    token, text = {"SpecialToken": {"id": name, "type_id": 0}}, {"id": "A", "type_id": 0}
    return {
        "type": "TemplateProcessing",
        "single": [token, {"Sequence": text}],
        "pair": [token, {"Sequence": text}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [number], "tokens": [name]}},
    }
