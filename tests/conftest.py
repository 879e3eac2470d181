"""What tests of several kinds share: one small tokenizer."""

import pytest

from tests.unit.data import corpora


@pytest.fixture(scope="session")
def tokenizer_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return corpora.train_tokenizer(tmp_path_factory.mktemp("tokenizer"))
