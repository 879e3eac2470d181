"""Tokenizers behind one interface: SentencePiece, Hugging Face `tokenizers`, tiktoken, or none.

Imports no torch, so preprocessing workers start quickly. The attributes are those that
megatron-core's datasets use. Not covered: chat templates, and tokenizers that need remote code.
"""

import abc
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from megatron_ponder.config.schema import DataConfig
from megatron_ponder.errors import DataError

COMMON_END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")


class Tokenizer(abc.ABC):
    """Converts text to ids and back."""

    vocab_size: int
    """All ids are below this."""
    eod: int
    """Id of the end of a document."""
    pad: int = -1
    """No padding id: sequences are packed."""
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


def build_tokenizer(config: DataConfig, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer that the settings name.

    Args:
        config: `tokenizer_type` and `tokenizer_model`.
        vocab_size: needed by NullTokenizer only.

    Raises:
        DataError: the model is missing, or is not of the given type.
    """
    if config.tokenizer_type == "NullTokenizer":
        return NullTokenizer(vocab_size)
    if config.tokenizer_model is None:
        raise DataError(f"--tokenizer-type {config.tokenizer_type} needs --tokenizer-model.")
    path = Path(config.tokenizer_model)
    if not path.exists():
        raise DataError(f"--tokenizer-model {path}: no such file.")
    if config.tokenizer_type == "SentencePieceTokenizer":
        return SentencePieceTokenizer(path)
    if config.tokenizer_type == "TikTokenizer":
        return TikTokenizer(path)
    return HuggingFaceTokenizer(path)


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece .model file."""

    def __init__(self, path: Path) -> None:
        try:
            # One thread per process: preprocessing scales with workers.
            self._model = sentencepiece.SentencePieceProcessor(model_file=str(path), num_threads=1)
        except (RuntimeError, OSError) as error:
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
        self.unique_identifiers = _identifiers("SentencePieceTokenizer", path)

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

    def __init__(self, path: Path) -> None:
        file = path / "tokenizer.json" if path.is_dir() else path
        try:
            self._model = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise DataError(
                f"--tokenizer-model {file}: not a tokenizers JSON file ({error}). For a "
                "SentencePiece model use --tokenizer-type SentencePieceTokenizer."
            ) from None
        self.vocab_size = self._model.get_vocab_size(with_added_tokens=True)
        self.eod = self._find_end_token(file)
        self.unique_identifiers = _identifiers("HuggingFaceTokenizer", file)

    def tokenize(self, text: str) -> list[int]:
        """See Tokenizer."""
        return self._model.encode(text, add_special_tokens=False).ids

    def tokenize_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """See Tokenizer."""
        encodings = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def detokenize(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return self._model.decode(list(ids), skip_special_tokens=False)

    def _find_end_token(self, file: Path) -> int:
        """The id of eos_token in tokenizer_config.json, or else of a common end token."""
        names = list(COMMON_END_TOKENS)
        config_file = file.parent / "tokenizer_config.json"
        if config_file.exists():
            stated = json.loads(config_file.read_text(encoding="utf-8")).get("eos_token")
            stated = stated.get("content") if isinstance(stated, dict) else stated
            names = [stated, *names] if stated else names
        for name in names:
            if (token := self._model.token_to_id(name)) is not None:
                return token
        raise DataError(
            f"--tokenizer-model {file}: no token that ends documents. Name one as eos_token in "
            f"{config_file.name} in the same folder."
        )


class TikTokenizer(Tokenizer):
    """A tiktoken vocabulary, described by a JSON file.

    Its keys are `ranks`, the relative path of a .tiktoken file (base64 bytes and a rank per line);
    `pattern`, the regular expression that splits text into words; `special_tokens`, ids by name;
    and `eos_token`, the special token that ends documents, needed unless it has a common name.
    """

    def __init__(self, path: Path) -> None:
        try:
            import tiktoken
            from tiktoken.load import load_tiktoken_bpe
        except ImportError:
            raise DataError(
                "--tokenizer-type TikTokenizer needs tiktoken: pip install tiktoken."
            ) from None
        try:
            described = json.loads(path.read_text(encoding="utf-8"))
            ranks_file = path.parent / described["ranks"]
            special_tokens = dict(described["special_tokens"])
            self._model = tiktoken.Encoding(
                path.stem,
                pat_str=described["pattern"],
                mergeable_ranks=load_tiktoken_bpe(str(ranks_file)),
                special_tokens=special_tokens,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"--tokenizer-model {path}: not a description of a tiktoken vocabulary "
                f"({error!r}). Give a JSON object with ranks, pattern and special_tokens."
            ) from None
        names = [described.get("eos_token"), *COMMON_END_TOKENS]
        found = next((name for name in names if name in special_tokens), None)
        if found is None:
            raise DataError(
                f"--tokenizer-model {path}: no token that ends documents. Name one of its "
                "special_tokens as eos_token."
            )
        self.eod = special_tokens[found]
        self.vocab_size = self._model.n_vocab
        described["ranks"] = hashlib.sha256(ranks_file.read_bytes()).hexdigest()
        content = json.dumps(described, sort_keys=True).encode()
        self.unique_identifiers = {
            "class": "TikTokenizer",
            "sha256": hashlib.sha256(content).hexdigest(),
        }

    def tokenize(self, text: str) -> list[int]:
        """See Tokenizer. Special tokens are treated as ordinary text."""
        return self._model.encode_ordinary(text)

    def detokenize(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
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


def _identifiers(kind: str, file: Path) -> dict[str, str]:
    """Kind and content hash, independent of the path of the file."""
    return {"class": kind, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
