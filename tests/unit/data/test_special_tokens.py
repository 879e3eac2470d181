"""Ids depend on the text alone, and special tokens appear where a setting says, nowhere else."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_ponder.config.schema import TokenizerConfig
from megatron_ponder.data.tokenizers import build_tokenizer
from megatron_ponder.errors import DataError
from tests.unit.data import corpora, json_tokenizers
from tests.unit.data.json_tokenizers import END, OTHER, added, begins_with, build, content, write

TEXT = "bak dom gel fum bik dal gom ful ban den"
STORED = {
    "truncation": {
        "truncation": {
            "direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0,
        },
    },
    "padding": {
        "padding": {
            "strategy": {"Fixed": 99}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": END,
        },
    },
    "dropout": {"model": content()["model"] | {"dropout": 0.9}},
}  # fmt: skip


@pytest.mark.parametrize("kind", STORED)
def test_stored_settings_change_no_document(kind: str, tmp_path: Path) -> None:
    plain = build(write(tmp_path / "plain", content()))
    stored = build(write(tmp_path / kind, content(**STORED[kind])))
    assert stored.tokenize(TEXT) == plain.tokenize(TEXT)
    assert stored.tokenize_batch([TEXT, "a"]) == plain.tokenize_batch([TEXT, "a"])
    assert json.loads(stored.content) == content()


def test_ids_with_gaps_stay_what_the_file_says(tmp_path: Path) -> None:
    tokens = [*content()["added_tokens"], added("<|far|>", 1000), added("<|near|>", 500)]
    folder = write(tmp_path / "t", content(added_tokens=tokens))
    tokenizer = build(folder, parse_special_tokens=True)
    assert tokenizer.tokenize("<|far|><|near|>") == [1000, 500]
    assert tokenizer.vocab_size == 1001
    assert sorted(tokenizer.token_ids()) == [*range(300), 500, 1000]
    assert tokenizer.detokenize([1000]) == "<|far|>"


def test_an_id_of_two_tokens_is_refused(tmp_path: Path) -> None:
    tokens = [*content()["added_tokens"][:1], added(OTHER, 7)]
    with pytest.raises(DataError, match=r"its id of '<\|im_end\|>', 7, is that of another"):
        build(write(tmp_path / "t", content(added_tokens=tokens)))


SPELLINGS = {
    "bpe": (content(), f"a {END} b{OTHER}"),
    "end token is an ordinary added token": (
        content(added_tokens=[added(END, 0, special=False), added(OTHER, 1)]),
        f"a {END} b",
    ),
    "merges make it": (
        content(
            model=content()["model"]
            | {
                "vocab": content()["model"]["vocab"] | {"ab": 300, "abc": 301},
                "merges": [["a", "b"], ["ab", "c"]],
            },
            added_tokens=[*content()["added_tokens"], added("abc", 301)],
        ),
        "abc abcd",
    ),
    "unigram": (json_tokenizers.unigram(), "a</s>b"),
}


@pytest.mark.parametrize("kind", SPELLINGS)
def test_text_that_spells_a_special_token_is_text(kind: str, tmp_path: Path) -> None:
    tokenizer, text = SPELLINGS[kind]
    folder = write(tmp_path / "t", tokenizer, {"eos_token": "</s>" if kind == "unigram" else END})
    names = {each["content"] for each in tokenizer["added_tokens"]}
    special = {each["id"] for each in tokenizer["added_tokens"]}
    plain, parsing = build(folder), build(folder, parse_special_tokens=True)
    for ids in (plain.tokenize(text), plain.tokenize_batch([text, text])[1]):
        assert special.isdisjoint(ids) and plain.detokenize(ids) == text
    assert any(name in text for name in names)
    assert not special.isdisjoint(parsing.tokenize(text))
    assert parsing.detokenize(parsing.tokenize(text)) == text
    assert plain.unique_identifiers != parsing.unique_identifiers


def test_a_tokenizer_that_has_no_other_spelling_refuses_the_text(tmp_path: Path) -> None:
    folder = write(tmp_path / "t", json_tokenizers.word_level())
    tokenizer = build(folder)
    assert tokenizer.tokenize("a b c") == [2, 3, 0]
    for call in (tokenizer.tokenize, lambda text: tokenizer.tokenize_batch([text])):
        with pytest.raises(DataError, match="spells the special token '</s>'.*--parse-special"):
            call("a </s> b")
    assert build(folder, parse_special_tokens=True).tokenize("a </s> b") == [2, 1, 3]
    for each, text in ((tokenizer, "a c"), (build(write(folder, json_tokenizers.unigram())), "ac")):
        assert each.losses(text, each.tokenize(text)) == {"unknown to the vocabulary": 1}


def tiktoken_vocabulary(folder: Path, **more: Any) -> str:
    lines = (b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256))
    (folder / "t.tiktoken").write_bytes(b"".join(lines))
    described = {"ranks": "t.tiktoken", "pattern": r"\s*\S+|\s+"}
    special = {END: 300, "<|begin|>": 400}
    (folder / "t.json").write_text(json.dumps({**described, "special_tokens": special, **more}))
    return str(folder / "t.json")


def test_tiktoken(tmp_path: Path) -> None:
    def build(path: str, **choices: Any) -> Any:
        settings = TokenizerConfig(tokenizer_type="TikTokenizer", tokenizer_model=path, **choices)
        return build_tokenizer(settings)

    path = tiktoken_vocabulary(tmp_path)
    tokenizer = build(path)
    assert tokenizer.tokenize(END) == list(END.encode())
    assert build(path, parse_special_tokens=True).tokenize(f"a{END}") == [97, 300]
    assert sorted(tokenizer.token_ids()) == [*range(256), 300, 400]
    assert tokenizer.vocab_size == 401
    with pytest.raises(DataError, match="the tokenizer fails"):
        tokenizer.detokenize([350])
    with pytest.raises(DataError, match="begins documents"):
        build(path, add_bos=True)
    path = tiktoken_vocabulary(tmp_path, bos_token="<|begin|>")
    assert build(path, add_bos=True).begin == (400,)
    with pytest.raises(DataError, match="eos_token 'x' is not one of its special_tokens"):
        build(tiktoken_vocabulary(tmp_path, eos_token="x"))


def test_an_end_token_that_the_vocabulary_lacks_is_refused(tmp_path: Path) -> None:
    for config in ({"eos_token": "<|typo|>"}, {"eos_token": {"content": "<|typo|>"}}):
        with pytest.raises(DataError, match=r"eos_token '<\|typo\|>' is not in the vocabulary"):
            build(write(tmp_path / "t", content(), config))


def test_the_end_token_is_part_of_the_identity(tmp_path: Path) -> None:
    one = build(write(tmp_path / "one", content()))
    two = build(write(tmp_path / "two", content(), {"eos_token": OTHER}))
    assert (one.eod, two.eod) == (0, 1)
    assert one.unique_identifiers != two.unique_identifiers
    assert one.unique_identifiers["sha256"] == two.unique_identifiers["sha256"]


@pytest.mark.parametrize(
    "config",
    [
        b"",
        b"\xff",
        b"[]",
        b"7",
        b"[" * 5000,
        b'{"eos_token": 7}',
        b'{"eos_token": ["</s>"]}',
        b'{"eos_token": {"content": null}}',
        b'{"eos_token": {}}',
        b'{"eos_token": ""}',
        b'{"bos_token": true}',
    ],
)
def test_a_broken_tokenizer_config_is_refused(config: bytes, tmp_path: Path) -> None:
    folder = write(tmp_path / "t", content())
    (folder / "tokenizer_config.json").write_bytes(config)
    with pytest.raises(DataError, match="tokenizer_config.json.*Correct or remove it"):
        build(folder)


@pytest.mark.parametrize("merges", [[["b", "absent"]], ["a"], [[1, 2]], [["a", "b", "c"]], 7])
def test_bad_merges_are_refused(merges: Any, tmp_path: Path) -> None:
    model = content()["model"] | {"merges": merges}
    with pytest.raises(DataError, match="not a tokenizers JSON file"):
        build(write(tmp_path / "t", content(model=model)))


def test_a_begin_token_is_a_stated_choice(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path / "t", content(post_processor=begins_with(OTHER, 1)))
    plain = build(folder)
    assert plain.begin == () and plain.tokenize(TEXT)[0] != 1
    assert "--tokenizer-hf-include-special-tokens adds them" in caplog.text
    included = build(folder, tokenizer_hf_include_special_tokens=True)
    assert included.begin == (1,) and included.tokenize(TEXT) == plain.tokenize(TEXT)
    with pytest.raises(DataError, match="Name one as bos_token"):
        build(folder, add_bos=True)
    write(folder, content(), {"bos_token": OTHER})
    stated = build(folder, add_bos=True)
    assert stated.begin == (1,)
    identities = [each.unique_identifiers.get("begin") for each in (plain, included, stated)]
    assert identities == [None, "1", "1"]
    with pytest.raises(DataError, match="give one of them"):
        build(folder, add_bos=True, tokenizer_hf_include_special_tokens=True)


def test_tokens_after_a_text_are_refused(tmp_path: Path) -> None:
    post_processor = begins_with(OTHER, 1)
    post_processor["single"].reverse()
    folder = write(tmp_path / "t", content(post_processor=post_processor))
    with pytest.raises(DataError, match="also adds tokens after a text"):
        build(folder, tokenizer_hf_include_special_tokens=True)


def test_sentencepiece_and_ids(tokenizer_model: str) -> None:
    def build(**settings: Any) -> Any:
        return build_tokenizer(TokenizerConfig(**settings))

    assert build(tokenizer_model=tokenizer_model, add_bos=True).begin == (1,)
    with pytest.raises(DataError, match="is for HuggingFaceTokenizer"):
        build(tokenizer_model=tokenizer_model, tokenizer_hf_include_special_tokens=True)
    with pytest.raises(DataError, match="no begin token"):
        build(tokenizer_type="NullTokenizer", add_bos=True)


def test_documents_begin_with_it(tmp_path: Path, tokenizer_model: str) -> None:
    texts = corpora.texts(3)
    corpus = corpora.write_json_lines(tmp_path / "c.jsonl", texts)
    corpora.run_preprocess(corpus, tmp_path / "out", tokenizer_model=tokenizer_model, add_bos=True)
    documents = corpora.read_documents(str(tmp_path / "out_text_document"))
    assert documents == [[1, *corpora.encode(tokenizer_model, text), 2] for text in texts]


@pytest.mark.parametrize("word_cache", [False, True])
def test_what_is_lost_is_counted(
    word_cache: bool, tmp_path: Path, tokenizer_model: str, caplog: pytest.LogCaptureFixture
) -> None:
    corpus = corpora.write_json_lines(
        tmp_path / "c.jsonl", ["a\u2581b\u2581", "plain", "\u2581", "x\u2585y"]
    )
    summary = corpora.run_preprocess(
        corpus, tmp_path / "out", tokenizer_model=tokenizer_model, word_cache=word_cache
    )
    expected = {"texts": 2, "U+2581, read as spaces": 3}
    assert summary.losses == expected
    assert json.loads((tmp_path / "out.manifest.json").read_text())["losses"] == expected
    assert "2 texts have characters that the tokenizer does not give back" in caplog.text
