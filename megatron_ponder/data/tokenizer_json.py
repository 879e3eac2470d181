"""Reads tokenizer.json, and tokenizer_config.json beside it, so that ids depend on the text alone.

A tokenizer.json may hold settings of the batches it was once used for (truncation, padding) and of
training (dropout); the library gives other ids than the file states if ids have gaps; and it turns
text that spells a special token into that token. All of this is corrected in the JSON before the
library reads it, so an export of the corrected JSON gives the same ids elsewhere. Not covered:
tokens that only tokenizer_config.json lists, chat templates.
"""

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tokenizers

from megatron_ponder.config.schema import TokenizerConfig
from megatron_ponder.errors import DataError

logger = logging.getLogger(__name__)

COMMON_END_TOKENS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
CONFIG_NAME = "tokenizer_config.json"
ROLES = ("eos_token", "bos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
NEVER = -1e6
"""Log probability of pieces that must not be recognised in text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonTokenizer:
    """A tokenizer of the tokenizers library, and what is known about its ids."""

    model: tokenizers.Tokenizer
    content: str
    """JSON from which other programs get these ids, `begin` included; the file's own text where
    nothing had to be changed."""
    eod: int
    """Id of the end token."""
    begin: tuple[int, ...]
    """Ids before every document."""
    ids: frozenset[int]
    """All ids that a token has."""
    unknown: int | None
    """Id that stands for whatever the vocabulary lacks, if there is one."""
    refused: frozenset[int]
    """Special ids that the model could still give for a text that spells them."""


def load_json_tokenizer(file: Path, config: TokenizerConfig) -> JsonTokenizer:
    """Load a tokenizer.json.

    Args:
        file: the JSON file.
        config: the choices that concern special tokens.

    Raises:
        DataError: it or tokenizer_config.json is damaged, or lacks a token that is needed.
    """
    text = _read(file)
    content = _parse(file, text)
    named = read_named_tokens(file.with_name(CONFIG_NAME))
    corrected = dict(_corrected(content, named, parse_special=config.parse_special_tokens))
    with library_calls(functools.partial(_not_a_tokenizer, file)):
        is_same = corrected == content
        model = tokenizers.Tokenizer.from_str(text if is_same else json.dumps(corrected))
        vocabulary = model.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise _not_a_tokenizer(file, "it has no tokens")
    for token in _added(content):
        if model.token_to_id(token["content"]) != token["id"]:
            raise DataError(
                f"--tokenizer-model {file}: its id of {token['content']!r}, {token['id']}, is that "
                "of another token, or cannot be kept by the tokenizers library. Correct the file."
            )
    # Named tokens count as special also where the file has them as ordinary ones.
    model.add_special_tokens([name for name in named.values() if name in vocabulary])
    model.encode_special_tokens = not config.parse_special_tokens
    begin = _begin(file, model, vocabulary, named, config)
    adds = begin or model.num_special_tokens_to_add(is_pair=False)
    if adds and not config.tokenizer_hf_include_special_tokens:
        corrected["post_processor"] = _template([(str(model.id_to_token(i)), i) for i in begin])
    unknown = corrected["model"].get("unk_id")
    if unknown is None:
        unknown = vocabulary.get(corrected["model"].get("unk_token"))
    spelled = set() if config.parse_special_tokens else _spelled(corrected)
    return JsonTokenizer(
        model=model,
        content=text if corrected == content else json.dumps(corrected, ensure_ascii=False),
        eod=_end_token(file, vocabulary, named),
        begin=begin,
        ids=frozenset(vocabulary.values()),
        unknown=unknown,
        refused=frozenset(vocabulary[name] for name in _special(content, named) & spelled),
    )


def read_named_tokens(file: Path) -> dict[str, str]:
    """The tokens that a tokenizer_config.json names, by role (eos_token, ...); none without a file.

    Raises:
        DataError: the file is damaged.
    """
    if not file.exists():
        return {}
    settings = _parse(file, _read(file))
    named = {}
    for role in ROLES:
        stated = settings.get(role)
        name = stated.get("content") if isinstance(stated, dict) else stated
        if isinstance(name, str) and name:
            named[role] = name
        elif stated is not None:
            raise DataError(
                f"{file}: {role} {str(stated)[:80]!r}: must be the text of a token, or an object "
                "with the text as content. Correct or remove it."
            )
    return named


@contextlib.contextmanager
def library_calls(build_error: Callable[[str], DataError]) -> Iterator[None]:
    """Make a user error of whatever a tokenizer library raises; its Rust panics are no Exception.

    Args:
        build_error: makes the error from the library's message.
    """
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if isinstance(error, DataError) or not (is_panic or isinstance(error, Exception)):
            raise
        raise build_error(str(error).strip() or type(error).__name__) from None


@functools.cache
def warn_once(message: str) -> None:
    """Log a warning, once per process and its forked workers."""
    logger.warning("%s", message)


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise _not_a_tokenizer(file, f"not UTF-8 text, {error.reason}") from None
    except OSError as error:
        raise DataError(f"--tokenizer-model {file}: cannot be read: {error.strerror}.") from None


def _parse(file: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _not_a_tokenizer(file, f"not JSON, {error}") from None
    if not isinstance(content, dict):
        raise _not_a_tokenizer(file, "not a JSON object")
    return content


def _not_a_tokenizer(file: Path, reason: str) -> DataError:
    if file.name == CONFIG_NAME:
        return DataError(f"{file}: damaged ({reason}). Correct or remove it.")
    return DataError(
        f"--tokenizer-model {file}: not a tokenizers JSON file ({reason}). For a SentencePiece "
        "model use --tokenizer-type SentencePieceTokenizer."
    )


def _special(content: dict[str, Any], named: dict[str, str]) -> set[str]:
    """Texts of all special tokens."""
    special = {token["content"] for token in _added(content) if token.get("special")}
    return special | set(named.values())


def _added(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The added tokens; none if they are malformed, which the library reports."""
    added = content.get("added_tokens")
    is_sound = isinstance(added, list) and all(
        isinstance(token, dict)
        and isinstance(token.get("content"), str)
        and type(token.get("id")) is int
        for token in added
    )
    return added if is_sound else []  # type: ignore[return-value]


def _corrected(
    content: dict[str, Any], named: dict[str, str], *, parse_special: bool
) -> dict[str, Any]:
    """The JSON with all that this module corrects; malformed parts stay as they are."""
    model = content.get("model")
    if not isinstance(model, dict):
        return content
    stored = {name: None for name in ("truncation", "padding") if content.get(name) is not None}
    changes: dict[str, Any] = {"dropout": None} if model.get("dropout") is not None else {}
    if isinstance(model.get("vocab"), dict):
        changes["vocab"] = _with_stated_ids(model["vocab"], _added(content))
    if not parse_special:
        changes |= _without_special(model, _special(content, named))
    return content | stored | {"model": model | changes}


def _with_stated_ids(vocab: dict[str, Any], added: list[dict[str, Any]]) -> dict[str, Any]:
    """The vocabulary; with the added tokens if the library would number them otherwise.

    It gives a token that the model's vocabulary lacks the next free id, whatever the file states.
    """
    missing = [token for token in added if token["content"] not in vocab]
    stated = [token["id"] for token in missing]
    if stated == list(range(len(vocab), len(vocab) + len(missing))):
        return vocab
    return vocab | {token["content"]: token["id"] for token in missing}


def _without_special(model: dict[str, Any], special: set[str]) -> dict[str, Any]:
    """Changes after which the model itself no longer recognises special tokens in text."""
    vocab, merges = model.get("vocab"), model.get("merges")
    if isinstance(vocab, list):
        # Unigram: pieces with their log probabilities.
        return {
            "vocab": [
                [piece[0], NEVER]
                if isinstance(piece, list) and len(piece) == 2 and str(piece[0]) in special
                else piece
                for piece in vocab
            ]
        }
    if isinstance(merges, list) and isinstance(vocab, dict) and not special.isdisjoint(vocab):
        return {"merges": [merge for merge in merges if _merged(merge) not in special]}
    return {}


def _merged(merge: object) -> str | None:
    """The token that a merge makes; None for what is no merge."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        return None
    return "".join(parts)


def _spelled(content: dict[str, Any]) -> set[str]:
    """Tokens that the model gives for a text that spells them, other than by merging."""
    model = content["model"]
    is_bpe = model.get("type") == "BPE" or "merges" in model
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or (is_bpe and not model.get("ignore_merges")):
        return set()
    return set(vocab) - {model.get("unk_token")}


def _end_token(file: Path, vocabulary: dict[str, int], named: dict[str, str]) -> int:
    """The id of eos_token, or else of a common end token."""
    stated = named.get("eos_token")
    names = COMMON_END_TOKENS if stated is None else (stated,)
    for name in names:
        if name in vocabulary:
            return vocabulary[name]
    if stated is not None:
        raise _not_in_vocabulary(file, "eos_token", stated)
    raise DataError(
        f"--tokenizer-model {file}: no token that ends documents. Name one as eos_token in "
        f"{CONFIG_NAME} in the same folder."
    )


def _begin(
    file: Path,
    model: tokenizers.Tokenizer,
    vocabulary: dict[str, int],
    named: dict[str, str],
    config: TokenizerConfig,
) -> tuple[int, ...]:
    """Ids before every document, as the settings choose them."""
    if config.add_bos:
        stated = named.get("bos_token")
        if stated is None:
            raise DataError(
                f"--add-bos: {file} has no begin token. Name one as bos_token in {CONFIG_NAME} in "
                "the same folder, or leave --add-bos out."
            )
        if stated not in vocabulary:
            raise _not_in_vocabulary(file, "bos_token", stated)
        return (vocabulary[stated],)
    if model.num_special_tokens_to_add(is_pair=False) == 0:
        return ()
    if not config.tokenizer_hf_include_special_tokens:
        warn_once(
            f"{file}: its post-processor adds special tokens to a text; documents and prompts are "
            "made without. --tokenizer-hf-include-special-tokens adds them, as does --add-bos."
        )
        return ()
    with library_calls(functools.partial(_not_a_tokenizer, file)):
        plain = model.encode("a", add_special_tokens=False).ids
        whole = model.encode("a").ids
    begin = tuple(whole[: len(whole) - len(plain)])
    if whole != [*begin, *plain]:
        raise DataError(
            f"--tokenizer-hf-include-special-tokens: {file} also adds tokens after a text, which "
            "would end documents and prompts twice. Use --add-bos and --append-eod instead."
        )
    return begin


def _template(begin: list[tuple[str, int]]) -> dict[str, Any]:
    """A post-processor that puts tokens before a text."""
    first = [{"SpecialToken": {"id": token, "type_id": 0}} for token, _ in begin]
    parts = [{"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")]
    return {
        "type": "TemplateProcessing",
        "single": [*first, parts[0]],
        "pair": [*first, *parts],
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]} for token, number in begin
        },
    }


def _not_in_vocabulary(file: Path, role: str, name: str) -> DataError:
    return DataError(
        f"{file.with_name(CONFIG_NAME)}: {role} {name!r} is not in the vocabulary of {file.name}. "
        "Correct it, or add the token to the vocabulary."
    )
