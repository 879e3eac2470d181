"""Tokenizers lose nothing and say clearly what is wrong with a file."""

import base64
import dataclasses
import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ponder.config.schema import DataConfig
from megatron_ponder.data.sentencepiece_training import (
    PAUSE_ID,
    TokenizerTrainingConfig,
    sample_texts,
    train_sentencepiece,
)
from megatron_ponder.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ponder.errors import DataError
from tests.unit.data import corpora


def build(kind: str, path: str | Path | None = None, vocab_size: int | None = None) -> Tokenizer:
    model = None if path is None else str(path)
    return build_tokenizer(
        DataConfig(tokenizer_type=kind, tokenizer_model=model),  # type: ignore[arg-type]
        vocab_size,
    )


@pytest.mark.parametrize("text", corpora.HARD_TEXTS)
def test_sentencepiece_loses_nothing(text: str, tokenizer_model: str) -> None:
    tokenizer = build("SentencePieceTokenizer", tokenizer_model)
    assert tokenizer.vocab_size == corpora.VOCAB_SIZE and tokenizer.eod == 2
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
    assert tokenizer.eod not in tokenizer.tokenize(text)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581")))
def test_sentencepiece_loses_no_text(text: str, tokenizer_model: str) -> None:
    tokenizer = build("SentencePieceTokenizer", tokenizer_model)
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_a_json_tokenizer_by_file_or_folder(tmp_path: Path) -> None:
    folder = corpora.train_json_tokenizer(tmp_path / "hf", "<|endoftext|>")
    tokenizer = build("HuggingFaceTokenizer", folder)
    text = "bak dom\n"
    assert tokenizer.tokenize(text) == build(
        "HuggingFaceTokenizer", folder / "tokenizer.json"
    ).tokenize(text)
    assert tokenizer.tokenize_batch([text, ""]) == [tokenizer.tokenize(text), []]
    assert tokenizer.eod == 0 and tokenizer.eod not in tokenizer.tokenize(text)


def test_the_end_token_of_a_json_tokenizer(tmp_path: Path) -> None:
    folder = corpora.train_json_tokenizer(tmp_path / "hf", "<stop>")
    with pytest.raises(DataError, match="no token that ends documents"):
        build("HuggingFaceTokenizer", folder)
    for stated in ("<stop>", {"content": "<stop>"}):
        (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": stated}))
        assert build("HuggingFaceTokenizer", folder).eod == 0


def test_ids_as_text() -> None:
    tokenizer = build("NullTokenizer", vocab_size=10)
    assert tokenizer.tokenize(" 3 0\n8") == [3, 0, 8] and tokenizer.eod == 9
    for text in ("10", "-1", "x"):
        with pytest.raises(DataError, match="NullTokenizer"):
            tokenizer.tokenize(text)


def test_identifiers_follow_content_not_place(tmp_path: Path, tokenizer_model: str) -> None:
    """megatron-core keys its index cache by them."""
    copy = tmp_path / "copy.model"
    copy.write_bytes(Path(tokenizer_model).read_bytes())
    first = build("SentencePieceTokenizer", tokenizer_model)
    assert build("SentencePieceTokenizer", copy).unique_identifiers == first.unique_identifiers


def test_what_is_no_tokenizer(tmp_path: Path, tokenizer_model: str) -> None:
    text = tmp_path / "text"
    text.write_text("no tokenizer")
    for kind, path, message in (
        ("SentencePieceTokenizer", text, "not a SentencePiece model"),
        ("HuggingFaceTokenizer", tokenizer_model, "not a tokenizers JSON file"),
        ("HuggingFaceTokenizer", tmp_path / "none", "no such file"),
        ("SentencePieceTokenizer", None, "needs --tokenizer-model"),
        ("NullTokenizer", None, "needs --vocab-size"),
    ):
        with pytest.raises(DataError, match=message):
            build(kind, path)


def test_training_is_reproducible_and_never_replaces_a_file_unasked(tmp_path: Path) -> None:
    models = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        models.append(Path(corpora.train_tokenizer(tmp_path / name)))
    assert models[0].read_bytes() == models[1].read_bytes()
    with pytest.raises(DataError, match="--overwrite"):
        corpora.train_tokenizer(tmp_path / "one")


def test_too_little_text_for_the_vocabulary(tmp_path: Path) -> None:
    corpus = corpora.write_json_lines(tmp_path / "a.jsonl", ["abc"])
    output = tmp_path / "t.model"
    config = TokenizerTrainingConfig(input=(corpus,), output=str(output), vocab_size=5000)
    with pytest.raises(DataError, match="smaller --vocab-size"):
        train_sentencepiece(config)
    assert not output.exists()


def sample(folder: Path, **settings: Any) -> list[str]:
    corpus = corpora.write_json_lines(folder / "c.jsonl", corpora.texts(200))
    config = TokenizerTrainingConfig(input=(corpus,), output="x", **settings)
    return sample_texts(config)


def test_training_text_is_an_even_sample_in_the_order_of_the_input(tmp_path: Path) -> None:
    everything = sample(tmp_path)
    assert "".join(everything) == "".join(corpora.texts(200))
    some = sample(tmp_path, max_train_bytes=20_000)
    assert 15_000 < sum(map(len, some)) <= 20_000
    places = [everything.index(text) for text in some]
    assert places == sorted(places)
    assert places[0] < len(everything) / 5 and places[-1] > len(everything) * 4 / 5
    assert sample(tmp_path, max_train_bytes=20_000) == some
    assert sample(tmp_path, max_train_bytes=20_000, seed=2) != some


def test_training_says_what_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = [*corpora.texts(), "x\u2585y", "a\u2581b\u2581"]
    corpus = corpora.write_json_lines(tmp_path / "c.jsonl", texts)
    config = TokenizerTrainingConfig(
        input=(corpus,), output=str(tmp_path / "t.model"), vocab_size=300
    )
    train_sentencepiece(config)
    assert re.search("U\\+2585, which it reserves: 1 of [0-9]+ texts", caplog.text)
    assert "symbol for a space, 2 times" in caplog.text


def test_training_text_is_as_strict_as_preprocessing(tmp_path: Path) -> None:
    corpus = tmp_path / "c.jsonl.gz"
    corpus.write_bytes(gzip.compress(b'{"text": "one"}\n{"text": 1}\n{"text": "two"}\n'))
    settings = {"input": (str(corpus),), "output": "x"}
    with pytest.raises(DataError, match=":2: key 'text' is not a string"):
        sample_texts(TokenizerTrainingConfig(**settings))  # type: ignore[arg-type]
    config = TokenizerTrainingConfig(max_rejected=1, **settings)  # type: ignore[arg-type]
    assert sample_texts(config) == ["one", "two"]


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
def test_the_hugging_face_export_gives_the_same_ids(model_type: str, tmp_path: Path) -> None:
    # The name of a control piece in text, of characters that the vocabulary lacks, is refused.
    hard = corpora.HARD_TEXTS if model_type == "bpe" else corpora.HARD_TEXTS[:-1]
    texts = [*corpora.texts(), *hard]
    corpus = corpora.write_json_lines(tmp_path / "c.jsonl", texts)
    output = tmp_path / "t.model"
    config = TokenizerTrainingConfig(
        input=(corpus,),
        output=str(output),
        vocab_size=340,
        model_type=model_type,  # type: ignore[arg-type]
        hf_output=str(tmp_path / "hf"),
    )
    train_sentencepiece(config)
    ours = build("SentencePieceTokenizer", output)
    theirs = build("HuggingFaceTokenizer", tmp_path / "hf")
    assert (theirs.eod, theirs.vocab_size) == (ours.eod, ours.vocab_size)
    for text in (*corpora.texts(60), *hard):
        assert theirs.tokenize(text) == ours.tokenize(text), text
        assert theirs.detokenize(ours.tokenize(text)) == text
    with pytest.raises(DataError, match="exists already"):
        train_sentencepiece(dataclasses.replace(config, output=str(tmp_path / "other.model")))


def test_tiktoken_vocabularies(tmp_path: Path) -> None:
    ranks = [bytes([i]) for i in range(256)] + [b"ba", b"bak"]
    lines = (b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(ranks))
    (tmp_path / "t.tiktoken").write_bytes(b"".join(lines))
    described = {
        "ranks": "t.tiktoken",
        "pattern": r"\s*\S+|\s+",
        "special_tokens": {"<|endoftext|>": 258},
    }
    path = tmp_path / "t.json"
    path.write_text(json.dumps(described))
    tokenizer = build("TikTokenizer", path)
    assert tokenizer.tokenize("bak ba") == [257, 32, 256]
    assert (tokenizer.eod, tokenizer.vocab_size) == (258, 259)
    for text in (*corpora.HARD_TEXTS, "<|endoftext|>"):
        assert tokenizer.detokenize(tokenizer.tokenize(text)) == text
        assert tokenizer.eod not in tokenizer.tokenize(text)
    (tmp_path / "t.tiktoken").write_bytes(b"".join((b"YWI= 256\n",)))
    other = build("TikTokenizer", path)
    with pytest.raises(DataError, match="the tokenizer fails"):
        other.tokenize("bak")  # nothing is left of the vocabulary before
    assert other.unique_identifiers != tokenizer.unique_identifiers
    path.write_text(json.dumps({**described, "special_tokens": {"<stop>": 258}}))
    with pytest.raises(DataError, match="eos_token"):
        build("TikTokenizer", path)
    path.write_text(json.dumps({"pattern": "x"}))
    with pytest.raises(DataError, match="ranks, pattern and special_tokens"):
        build("TikTokenizer", path)


def test_a_batch_gives_what_its_texts_give(tmp_path: Path, tokenizer_model: str) -> None:
    folder = corpora.train_json_tokenizer(tmp_path / "hf", "<|endoftext|>")
    texts = [*corpora.texts(), *corpora.HARD_TEXTS, ""]
    for tokenizer in (
        build("SentencePieceTokenizer", tokenizer_model),
        build("HuggingFaceTokenizer", folder),
    ):
        assert tokenizer.tokenize_batch(texts) == [tokenizer.tokenize(text) for text in texts]


def test_a_reserved_pause_piece_changes_no_other_id(tmp_path: Path, tokenizer_model: str) -> None:
    corpus = corpora.write_json_lines(tmp_path / "corpus.jsonl", corpora.texts())
    models = []
    for name, piece in (("plain", None), ("paused", "<pause>")):
        output = str(tmp_path / f"{name}.model")
        config = TokenizerTrainingConfig(
            input=(corpus,), output=output, vocab_size=corpora.VOCAB_SIZE, pause_piece=piece
        )
        train_sentencepiece(config)
        models.append(sentencepiece.SentencePieceProcessor(model_file=output))
    plain, paused = models
    assert paused.id_to_piece(PAUSE_ID) == "<pause>" and paused.is_control(PAUSE_ID)
    for id_ in set(range(corpora.VOCAB_SIZE)) - {PAUSE_ID}:
        assert paused.id_to_piece(id_) == plain.id_to_piece(id_)
    for text in (*corpora.HARD_TEXTS, "<pause>", *corpora.texts(5)):
        assert PAUSE_ID not in paused.encode(text)
        assert paused.encode(text) == plain.encode(text)
