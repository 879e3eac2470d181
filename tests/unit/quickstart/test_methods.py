"""Which models the quickstart compares."""

import pytest
from contestants import CONTESTANTS, chosen_contestants

from megatron_ponder.config.parse import parse_args
from megatron_ponder.errors import ConfigError
from megatron_ponder.ponder.method import load_method


def names(methods: str) -> list[str]:
    return [contestant.name for contestant in chosen_contestants(methods)]


def test_all_of_them_or_some() -> None:
    assert names("all") == ["vanilla", "ponderlm2", "ponderlm", "loop", "pause"]
    assert names("loop, vanilla") == ["vanilla", "loop"]
    for wrong in ("", "vanilla,pondering"):
        with pytest.raises(ConfigError, match="or all"):
            names(wrong)


def test_each_is_the_method_that_it_is_named_after() -> None:
    for contestant in CONTESTANTS:
        config = parse_args(contestant.flags, prog="test").method
        method = load_method(config)
        assert type(method).__module__.endswith(f".{contestant.name}")
        assert config.method == contestant.name
        assert config.uses_pause_token == (config.pause_token_id is not None)
