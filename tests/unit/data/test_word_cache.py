"""Remembered words give the ids that the library gives; models where they might not are refused."""

from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ponder.config.schema import DataConfig
from megatron_ponder.data import word_cache
from megatron_ponder.data.tokenizers import Tokenizer, build_tokenizer
from megatron_ponder.data.word_cache import word_cached
from megatron_ponder.errors import DataError
from tests.unit.data import corpora
from tests.unit.data.corpora import run_preprocess


def build(model: str) -> Tokenizer:
    return build_tokenizer(DataConfig(tokenizer_model=model))


@settings(max_examples=400, deadline=None)
@given(
    text=st.text(
        st.sampled_from(" \u2581\n\tbakdomgel<s>/") | st.characters(exclude_categories=["Cs"])
    )
)
def test_ids_are_those_of_the_library(text: str, tokenizer_model: str) -> None:
    plain = build(tokenizer_model)
    cached = word_cached(plain, Path(tokenizer_model))
    for _ in range(2):
        assert cached.tokenize(text) == plain.tokenize(text)


def test_long_texts_and_a_full_cache(tokenizer_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "MAX_WORDS", 20)
    plain = build(tokenizer_model)
    cached = word_cached(plain, Path(tokenizer_model))
    texts = [*corpora.texts(), *corpora.HARD_TEXTS, "x" * 5000, ""]
    assert cached.tokenize_batch(texts) == plain.tokenize_batch(texts)
    assert (cached.eod, cached.vocab_size) == (plain.eod, plain.vocab_size)


def test_the_same_files_and_shards_that_either_can_use(
    tokenizer_model: str, tmp_path: Path
) -> None:
    corpus = corpora.write_json_lines(tmp_path / "c.jsonl", corpora.texts())
    for name, cached in (("plain", False), ("cached", True)):
        (tmp_path / name).mkdir()
        prefix = tmp_path / name / "out"
        run_preprocess(corpus, prefix, tokenizer_model=tokenizer_model, word_cache=cached)
    for name in ("out_text_document.bin", "out_text_document.idx", "out.manifest.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "cached" / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "unigram"}, "not a BPE model"),
        ({"normalization_rule_name": "nmt_nfkc"}, "normalises text"),
        ({"add_dummy_prefix": True}, "dummy prefix"),
        ({"remove_extra_whitespaces": True}, "removes extra white space"),
        ({"user_defined_symbols": ["b a"]}, "user-defined pieces"),
        ({"split_by_whitespace": False}, "span a space"),
    ],
    ids=str,
)
def test_models_that_look_beyond_words_are_refused(
    changes: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    options = {
        "model_type": "bpe",
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpora.texts()),
        model_prefix=str(tmp_path / "t"),
        vocab_size=100,
        hard_vocab_limit=False,
        minloglevel=2,
        **{**options, **changes},
    )
    model = str(tmp_path / "t.model")
    with pytest.raises(DataError, match=problem):
        word_cached(build(model), Path(model))


def test_other_tokenizers_are_refused(tmp_path: Path) -> None:
    corpus = corpora.write_json_lines(tmp_path / "c.jsonl", ["1"])
    with pytest.raises(DataError, match="for SentencePiece models"):
        run_preprocess(
            corpus,
            tmp_path / "out",
            tokenizer_type="NullTokenizer",
            vocab_size=5,
            word_cache=True,
        )
