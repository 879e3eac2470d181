"""The tokenizer on its way in and out: found in a folder, written into one.

Out go the files that transformers loads: a SentencePiece model as tokenizer.json (checked on some
texts) with the .model itself beside it, a tokenizers JSON as it is with what describes it. A
tiktoken vocabulary has no such form here and is left out, which is told. Imports no torch.
"""

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import tokenizers

from megatron_ponder.config.schema import DataConfig, TokenizerType
from megatron_ponder.convert.json_values import read_object
from megatron_ponder.data.sentencepiece_export import export_tokenizer
from megatron_ponder.data.tokenizers import HuggingFaceTokenizer, Tokenizer, build_tokenizer
from megatron_ponder.errors import ConversionError, DataError
from megatron_ponder.files import write_text

logger = logging.getLogger(__name__)

JSON_FILE, MODEL_FILE, CONFIG_FILE = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
_BESIDE_JSON = (
    CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    MODEL_FILE,
)
SAMPLE_TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "def add(a: int, b: int) -> int:\n    return a + b  # a comment\n\n\nclass Empty:\n\tpass\n",
    "  two leading blanks, 3.14159, a-b_c/d, e@f.org; (g) [h] {i} <j>!?",
    "Gr\u00fc\u00dfe, na\u00efve caf\u00e9, \u0397\u03bb\u03b9\u03bf\u03c2, \u041c\u0438\u0440, "
    "\u4f60\u597d\uff0c\u4e16\u754c, \U0001f600",
)
"""On which an exported tokenizer must give the ids of the SentencePiece model."""


@dataclasses.dataclass(frozen=True)
class FoundTokenizer:
    """A tokenizer that fits a model."""

    kind: TokenizerType
    path: Path
    tokenizer: Tokenizer

    @property
    def settings(self) -> dict[str, Any]:
        """The run's settings that name it."""
        return {
            "tokenizer_type": self.kind,
            "tokenizer_model": str(self.path),
            "tokenizer_hf_include_special_tokens": bool(self.tokenizer.begin),
        }


def find_tokenizer(
    folder: Path, vocab_size: int, path: str | None, kind: TokenizerType | None
) -> FoundTokenizer | None:
    """The tokenizer of a folder, or the one that the user gave; None if there is none.

    Args:
        folder: to look in.
        vocab_size: ids must be below this.
        path: the user's.
        kind: the user's.

    Raises:
        DataError: one that was given cannot be read.
        ConversionError: it has more ids than the vocabulary.
    """
    if kind == "NullTokenizer":
        return None
    given = [Path(path)] if path is not None else []
    found = given or [file for name in (JSON_FILE, MODEL_FILE) if (file := folder / name).is_file()]
    for file in found:
        kind_here = kind or _kind_of(file)
        try:
            tokenizer = _load(file, kind_here)
        except DataError as error:
            if given:
                raise
            logger.warning("the folder's tokenizer is left out: %s", error)
            continue
        check_fit(tokenizer, file, vocab_size)
        return FoundTokenizer(kind_here, file.resolve(), tokenizer)
    return None


def _kind_of(path: Path) -> TokenizerType:
    return "SentencePieceTokenizer" if path.suffix == ".model" else "HuggingFaceTokenizer"


def _load(path: Path, kind: TokenizerType) -> Tokenizer:
    """A tokenizer that begins texts as its file says, since the model has learnt that."""
    config = DataConfig(tokenizer_type=kind, tokenizer_model=str(path))
    if kind == "HuggingFaceTokenizer":
        try:
            return build_tokenizer(
                dataclasses.replace(config, tokenizer_hf_include_special_tokens=True)
            )
        except DataError as error:
            tokenizer = build_tokenizer(config)
            logger.warning("%s", error)
            return tokenizer
    return build_tokenizer(config)


def check_fit(tokenizer: Tokenizer, path: Path, vocab_size: int) -> None:
    """Refuse a tokenizer with ids that the embedding has no row for.

    Raises:
        ConversionError: there are such ids.
    """
    if tokenizer.vocab_size > vocab_size:
        raise ConversionError(
            f"{path}: has {tokenizer.vocab_size} ids, but the model's vocabulary has {vocab_size} "
            "rows: it is another model's tokenizer. Give the right one with --tokenizer-model, or "
            "leave it out."
        )


def load_run_tokenizer(data: DataConfig, vocab_size: int) -> Tokenizer | None:
    """The tokenizer of a run, to export; None for runs that name none.

    Raises:
        ConversionError: it is not where it was, cannot be read, or does not fit.
    """
    if data.tokenizer_type == "NullTokenizer":
        return None
    if data.tokenizer_model is None:
        logger.warning(
            "the run names no tokenizer, so the folder gets none: give one with --tokenizer-model, "
            "or copy its files there"
        )
        return None
    try:
        tokenizer = build_tokenizer(data)
    except DataError as error:
        raise ConversionError(
            f"{error} Give its path with --tokenizer-model, or --without-tokenizer."
        ) from None
    check_fit(tokenizer, Path(data.tokenizer_model), vocab_size)
    return tokenizer


def write_tokenizer(data: DataConfig, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a run's tokenizer as files that transformers loads.

    Raises:
        ConversionError: a SentencePiece model that has no such form.
    """
    assert data.tokenizer_model is not None
    path = Path(data.tokenizer_model)
    if data.tokenizer_type == "TikTokenizer":
        logger.warning("a tiktoken vocabulary has no form that transformers loads: left out")
    elif data.tokenizer_type == "SentencePieceTokenizer":
        try:
            export_tokenizer(path, folder, SAMPLE_TEXTS, add_bos=data.add_bos)
        except DataError as error:
            raise ConversionError(f"{error} Or export --without-tokenizer.") from None
        shutil.copyfile(path, folder / MODEL_FILE)
        _name_tokens(path.parent / CONFIG_FILE, folder, add_bos=data.add_bos)
    else:
        assert isinstance(tokenizer, HuggingFaceTokenizer)
        _copy_json(path, data, tokenizer, folder)


def _name_tokens(source: Path, folder: Path, *, add_bos: bool) -> None:
    """Call begin, padding and unknown tokens as the folder does that a .model was imported from.

    Not tokens that the model lacks: transformers would add them, with ids that have no embedding.
    """
    if not source.is_file():
        return
    stated, config = read_object(source), read_object(folder / CONFIG_FILE)
    known = tokenizers.Tokenizer.from_file(str(folder / JSON_FILE))
    for key in ("pad_token", "unk_token") if add_bos else ("bos_token", "pad_token", "unk_token"):
        token = stated.get(key, config.get(key))
        text = token.get("content") if isinstance(token, dict) else token
        if text is None or (isinstance(text, str) and known.token_to_id(text) is not None):
            config[key] = text
    write_text(folder / CONFIG_FILE, json.dumps(config, indent=1) + "\n")


def _copy_json(path: Path, data: DataConfig, tokenizer: HuggingFaceTokenizer, folder: Path) -> None:
    """A tokenizers JSON that gives the run's ids, and what lies beside it."""
    file = path / JSON_FILE if path.is_dir() else path
    write_text(folder / JSON_FILE, tokenizer.content)
    for name in _BESIDE_JSON if file.name == JSON_FILE else ():
        if (file.parent / name).is_file():
            shutil.copyfile(file.parent / name, folder / name)
    stored = folder / CONFIG_FILE
    config = json.loads(stored.read_text(encoding="utf-8")) if stored.is_file() else {}
    has_template = "chat_template" in config or (folder / "chat_template.jinja").is_file()
    if has_template and not data.parse_special_tokens:
        logger.warning(
            "the tokenizer has a chat template, which spells special tokens: the exported one "
            "reads them in every text. Give split_special_tokens=True for text that users write"
        )
    for key in ("add_bos_token", "add_eos_token"):
        config.pop(key, None)  # the post-processor in the JSON says it
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 5 writes, 4 cannot read
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    ends = {"eos_token": tokenizer.detokenize([tokenizer.eod])}
    if tokenizer.begin:
        ends["bos_token"] = tokenizer.detokenize(tokenizer.begin[-1:])
    config = {**ends, "clean_up_tokenization_spaces": False} | {
        key: value for key, value in config.items() if value is not None
    }
    # The run's ids are those of the JSON; other classes may build a tokenizer of their own.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["model_input_names"] = ["input_ids", "attention_mask"]
    config["split_special_tokens"] = not (data.parse_special_tokens or has_template)
    write_text(stored, json.dumps(config, indent=1) + "\n")
