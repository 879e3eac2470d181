"""Text that is shown as it is generated: whole characters, and all of them."""

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ponder.config.schema import DataConfig
from megatron_ponder.data.tokenizers import NullTokenizer, Tokenizer, build_tokenizer
from megatron_ponder.inference.streaming import INCOMPLETE, TextStream
from tests.unit.data import corpora

PROMPT = "bak \u4f60"
BEHIND = " dom caf\u00e9\u4f60\u597d \U0001f600\U0001f468\u200d\U0001f469 end"


@pytest.fixture(scope="module", params=["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def tokenizer(request, tokenizer_model: str, tmp_path_factory) -> Tokenizer:
    path: str | Path = tokenizer_model
    if request.param == "HuggingFaceTokenizer":
        folder = tmp_path_factory.mktemp("streaming") / "tokenizer"
        path = corpora.train_json_tokenizer(folder, "<|endoftext|>")
        model = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
        model.decoder = tokenizers.decoders.ByteLevel()
        model.save(str(path / "tokenizer.json"))
    return build_tokenizer(DataConfig(tokenizer_type=request.param, tokenizer_model=str(path)))


def pieces(tokenizer: Tokenizer, prompt: list[int], ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer, prompt)
    return [*map(stream.add, ids), stream.finish()]


def test_never_half_a_character(tokenizer: Tokenizer) -> None:
    prompt, ids = tokenizer.tokenize(PROMPT), tokenizer.tokenize(BEHIND)
    shown = pieces(tokenizer, prompt, ids)
    assert "".join(shown) == BEHIND
    assert not any(INCOMPLETE in piece for piece in shown)
    # Characters of several tokens were there to be torn: decoded alone, some are.
    assert "" in shown[:-1]
    assert any(INCOMPLETE in tokenizer.detokenize([token]) for token in ids)


def test_what_never_becomes_a_character_is_marked_at_the_end(tokenizer: Tokenizer) -> None:
    prompt, ids = tokenizer.tokenize(PROMPT), tokenizer.tokenize("dom\U0001f600")[:-1]
    shown = pieces(tokenizer, prompt, ids)
    assert "".join(shown[:-1]) == "dom" and set(shown[-1]) == {INCOMPLETE}


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_any_ids_give_what_decoding_all_of_them_gives(data, tokenizer: Tokenizer) -> None:
    prompt = tokenizer.tokenize(PROMPT)
    some_id = st.integers(3, tokenizer.vocab_size - 1)  # 0 to 2 are no text
    ids = data.draw(st.lists(some_id, max_size=12))
    whole = tokenizer.detokenize([*prompt, *ids])
    assert PROMPT + "".join(pieces(tokenizer, prompt, ids)) == whole


def test_ids_as_text() -> None:
    assert pieces(NullTokenizer(20), [3, 4], [5, 16]) == [" 5", " 16", ""]
