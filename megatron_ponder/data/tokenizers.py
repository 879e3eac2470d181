"""Tokenizers behind one interface: SentencePiece, Hugging Face `tokenizers`, tiktoken, or none.

Imports no torch, so preprocessing workers start quickly. The attributes are those that
megatron-core's datasets use. Not covered: chat templates, and tokenizers that need remote code.
"""

import abc
import base64
import hashlib
import itertools
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from megatron_ponder.config.schema import TokenizerConfig
from megatron_ponder.data.tokenizer_json import (
    COMMON_END_TOKENS,
    library_calls,
    load_json_tokenizer,
)
from megatron_ponder.errors import DataError

BLANK = "\u2581"
"""SentencePiece's symbol for a space."""


class Tokenizer(abc.ABC):
    """Converts text to ids and back."""

    vocab_size: int
    """All ids are below this."""
    eod: int
    """Id of the end of a document."""
    begin: tuple[int, ...] = ()
    """Ids before every document and every prompt."""
    pad: int = -1
    """No padding id: sequences are packed."""
    unknown: int | None = None
    """Id that stands for whatever the vocabulary lacks, if there is one."""
    unique_identifiers: dict[str, str]
    """Identifies the tokenizer by content; megatron-core keys its index caches by it."""

    @abc.abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Ids of a text, without begin or end ids."""

    @abc.abstractmethod
    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of ids."""

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`tokenize` of each text."""
        return [self.tokenize(text) for text in texts]

    def token_ids(self) -> Collection[int]:
        """All ids that a token has."""
        return range(self.vocab_size)

    def losses(self, text: str, ids: Sequence[int]) -> dict[str, int]:
        """Characters of a text that its ids do not give back, by kind; empty if there are none.

        Not counted: what a tokenizer changes on purpose (Unicode normalisation, lower case).
        """
        counts = {}
        if self.unknown is not None and (unknown := ids.count(self.unknown)):
            counts["unknown to the vocabulary"] = unknown
        if BLANK in text:
            blanks = text.count(BLANK) - self.detokenize(ids).count(BLANK)
            if blanks > 0:
                counts["U+2581, read as spaces"] = blanks
        return counts


def build_tokenizer(config: TokenizerConfig, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer that the settings name.

    Args:
        config: the settings.
        vocab_size: needed by NullTokenizer only.

    Raises:
        DataError: the model is missing, is not of the given type, or lacks what is asked for.
    """
    includes_special = config.tokenizer_hf_include_special_tokens
    if includes_special and config.tokenizer_type != "HuggingFaceTokenizer":
        raise DataError(
            "--tokenizer-hf-include-special-tokens is for HuggingFaceTokenizer. For a begin token "
            "of another type give --add-bos."
        )
    if includes_special and config.add_bos:
        raise DataError(
            "--add-bos and --tokenizer-hf-include-special-tokens: give one of them, or documents "
            "may begin with two begin tokens."
        )
    if config.tokenizer_type == "NullTokenizer":
        if config.add_bos:
            raise DataError("--add-bos: NullTokenizer has no begin token; put its id in the text.")
        return NullTokenizer(vocab_size)
    if config.tokenizer_model is None:
        raise DataError(f"--tokenizer-type {config.tokenizer_type} needs --tokenizer-model.")
    path = Path(config.tokenizer_model)
    if not path.exists():
        raise DataError(f"--tokenizer-model {path}: no such file.")
    if config.tokenizer_type == "SentencePieceTokenizer":
        return SentencePieceTokenizer(path, config)
    if config.tokenizer_type == "TikTokenizer":
        return TikTokenizer(path, config)
    return HuggingFaceTokenizer(path, config)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model file. Its control pieces are never recognised in text."""

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        try:
            # One thread per process: preprocessing scales with workers.
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path), num_threads=1)
        except (RuntimeError, OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"--tokenizer-model {path}: not a SentencePiece model ({error}). For a tokenizers "
                "JSON file use --tokenizer-type HuggingFaceTokenizer."
            ) from None
        self.vocab_size = self._model.vocab_size()
        self.eod = self._model.eos_id()
        if self.eod < 0:
            raise DataError(
                f"--tokenizer-model {path}: the model has no end-of-sequence piece. Use one "
                "that has, such as those of tools/train_tokenizer.py."
            )
        self.unknown = self._model.unk_id()
        if config.add_bos:
            if self._model.bos_id() < 0:
                raise DataError(
                    f"--add-bos: {path} has no begin-of-sequence piece. Use a model that has one, "
                    "or leave --add-bos out."
                )
            self.begin = (self._model.bos_id(),)
        self.unique_identifiers = {
            **_identifiers("SentencePieceTokenizer", path),
            **_choices(config, self.begin),
        }

    def tokenize(self, text: str) -> list[int]:
        """See Tokenizer."""
        ids: list[int] = self._model.encode(text)
        return ids

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See Tokenizer."""
        ids: list[list[int]] = self._model.encode(list(texts))
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        text: str = self._model.decode(list(ids))
        return text


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json file, or a folder with one (and optionally tokenizer_config.json)."""

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        file = path / "tokenizer.json" if path.is_dir() else path
        loaded = load_json_tokenizer(file, config)
        self._model, self._ids, self._refused = loaded.model, loaded.ids, loaded.refused
        self.content = loaded.content
        """JSON from which other programs get these ids."""
        self.vocab_size = max(loaded.ids) + 1
        self.eod = loaded.eod
        self.begin = loaded.begin
        self.unknown = loaded.unknown
        self.unique_identifiers = {
            **_identifiers("HuggingFaceTokenizer", file),
            "eod": str(self.eod),
            **_choices(config, self.begin),
        }

    def token_ids(self) -> Collection[int]:
        """See Tokenizer."""
        return self._ids

    def tokenize(self, text: str) -> list[int]:
        """See Tokenizer."""
        with library_calls(_failure):
            ids = self._model.encode(text, add_special_tokens=False).ids
        return self._checked([ids])[0]

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See Tokenizer."""
        with library_calls(_failure):
            encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return self._checked([encoding.ids for encoding in encodings])

    def _checked(self, ids: list[list[int]]) -> list[list[int]]:
        """Refuse texts that became a special token although they are text."""
        if self._refused:
            for token in self._refused.intersection(itertools.chain.from_iterable(ids)):
                raise DataError(
                    f"the text spells the special token {self._model.id_to_token(token)!r}, which "
                    "this tokenizer cannot write as text. Change the text, or give "
                    "--parse-special-tokens."
                )
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        with library_calls(_failure):
            return self._model.decode(list(ids), skip_special_tokens=False)


class TikTokenizer(Tokenizer):
    """A tiktoken vocabulary, described by a JSON file.

    Its keys are `ranks`, the relative path of a .tiktoken file (base64 bytes and a rank per line);
    `pattern`, the regular expression that splits text into words; `special_tokens`, ids by name;
    and `eos_token`, the special token that ends documents, needed unless it has a common name;
    for --add-bos also `bos_token`, the special token that begins them.
    """

    def __init__(self, path: Path, config: TokenizerConfig) -> None:
        try:
            import tiktoken
        except ImportError:
            raise DataError(
                "--tokenizer-type TikTokenizer needs tiktoken: pip install tiktoken."
            ) from None

        def refusal(reason: str) -> DataError:
            return DataError(
                f"--tokenizer-model {path}: not a description of a tiktoken vocabulary ({reason}). "
                "Give a JSON object with ranks, pattern and special_tokens."
            )

        with library_calls(refusal):
            described = json.loads(path.read_text(encoding="utf-8"))
            ranks_file = path.parent / described["ranks"]
            stored = ranks_file.read_bytes()
            # tiktoken's own reader caches files by their path, also after they have changed.
            lines = (line.split() for line in stored.splitlines() if line)
            ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
            special_tokens = dict(described["special_tokens"])
            self._model = tiktoken.Encoding(
                path.stem,
                pat_str=described["pattern"],
                mergeable_ranks=ranks,
                special_tokens=special_tokens,
            )
            self._ids = frozenset([*ranks.values(), *special_tokens.values()])
            described["ranks"] = hashlib.sha256(stored).hexdigest()
            content = json.dumps(described, sort_keys=True).encode()
        self._parse_special = config.parse_special_tokens
        self.eod = _special_id(path, described, "eos_token", COMMON_END_TOKENS)
        if config.add_bos:
            self.begin = (_special_id(path, described, "bos_token", ()),)
        self.vocab_size = self._model.n_vocab
        self.unique_identifiers = {
            "class": "TikTokenizer",
            "sha256": hashlib.sha256(content).hexdigest(),
            **_choices(config, self.begin),
        }

    def token_ids(self) -> Collection[int]:
        """See Tokenizer."""
        return self._ids

    def tokenize(self, text: str) -> list[int]:
        """See Tokenizer."""
        with library_calls(_failure):
            if self._parse_special:
                return self._model.encode(text, allowed_special="all")
            return self._model.encode_ordinary(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        with library_calls(_failure):
            text: str = self._model.decode(list(ids))
        return text


class NullTokenizer(Tokenizer):
    """Text that consists of ids separated by spaces; the last id ends documents."""

    def __init__(self, vocab_size: int | None) -> None:
        if vocab_size is None:
            raise DataError("--tokenizer-type NullTokenizer needs --vocab-size.")
        self.vocab_size = vocab_size
        self.eod = vocab_size - 1
        self.unique_identifiers = {"class": "NullTokenizer", "vocab_size": str(vocab_size)}

    def tokenize(self, text: str) -> list[int]:
        """See Tokenizer.

        Raises:
            DataError: a part of the text is not an id.
        """
        try:
            ids = [int(part) for part in text.split()]
        except ValueError as error:
            raise DataError(f"NullTokenizer: {error}") from None
        if any(not 0 <= token < self.vocab_size for token in ids):
            raise DataError(f"NullTokenizer: ids must be from 0 to {self.vocab_size - 1}.")
        return ids

    def detokenize(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return " ".join(map(str, ids))


def _failure(reason: str) -> DataError:
    return DataError(f"the tokenizer fails: {reason}")


def _special_id(path: Path, described: dict[str, Any], role: str, common: Sequence[str]) -> int:
    """Id of the special token that a description names for a role, or else of a common one."""
    special_tokens, stated = described["special_tokens"], described.get(role)
    for name in common if stated is None else (stated,):
        if isinstance(name, str) and name in special_tokens:
            found: int = special_tokens[name]
            return found
    if stated is not None:
        raise DataError(
            f"--tokenizer-model {path}: {role} {str(stated)[:80]!r} is not one of its "
            "special_tokens. Correct it, or add it to them."
        )
    purpose = "ends" if role == "eos_token" else "begins"
    raise DataError(
        f"--tokenizer-model {path}: no token that {purpose} documents. Name one of its "
        f"special_tokens as {role}."
    )


def _choices(config: TokenizerConfig, begin: tuple[int, ...]) -> dict[str, str]:
    """What changes documents besides the tokenizer's files."""
    choices = {"begin": " ".join(map(str, begin))} if begin else {}
    if config.parse_special_tokens and config.tokenizer_type != "SentencePieceTokenizer":
        choices["special_tokens_in_text"] = "parsed"
    return choices


def _identifiers(kind: str, file: Path) -> dict[str, str]:
    """Kind and content hash, independent of the path of the file."""
    return {"class": kind, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
