"""Where the row of the pause token comes from."""

import pytest

from megatron_ponder.config.layout import padded_vocab_size
from megatron_ponder.config.presets import PRESETS
from megatron_ponder.config.resolve import PAUSE_TOKEN_ID, resolve
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import ConfigError


def resolved(tokenizer_vocab_size=None, method="pause", **settings):
    config = RunConfig().replaced(seq_length=64, method=method, **settings)
    return resolve(config, world_size=1, tokenizer_vocab_size=tokenizer_vocab_size)


def rows(config):
    return config.method.pause_token_id, config.model.vocab_size


def test_the_authors_row_where_no_text_uses_it():
    for preset in ("llama-125m", "pythia-70m"):
        for tokenizer in (None, 50277):
            assert rows(resolved(tokenizer, **PRESETS[preset])) == (PAUSE_TOKEN_ID, 50304)


def test_a_row_of_its_own_elsewhere():
    assert rows(resolved(2048)) == (2048, 2049)
    assert rows(resolved(50257, **PRESETS["gpt2"])) == (50257, 50258)
    assert rows(resolved(128000, vocab_size=128256)) == (128256, 128257)
    # It is a real row, also where padding had room for it.
    config = resolved(100, make_vocab_size_divisible_by=128)
    assert padded_vocab_size(config.model) == 128 and rows(config) == (100, 101)


def test_resolving_twice_adds_one_row_only():
    once = resolved(2048)
    assert resolve(once, world_size=1, tokenizer_vocab_size=2048) == once


def test_a_row_that_is_given_must_exist():
    assert rows(resolved(2048, pause_token_id=1)) == (1, 2048)
    with pytest.raises(ConfigError, match="--pause-token-id 2048: not in the vocabulary of 2048"):
        resolved(2048, pause_token_id=2048)
    with pytest.raises(ConfigError, match="--pause-token-id -1: must be at least 0"):
        resolved(2048, pause_token_id=-1)


def test_other_methods_are_left_alone():
    for method in ("vanilla", "ponderlm2", "ponderlm", "loop"):
        assert rows(resolved(2048, method)) == (None, 2048)
