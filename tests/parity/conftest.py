"""One set of checkpoints and one truth for all tests of layouts."""

import pytest

from tests.parity.layouts import MODELS, Layout, measure_layout, prepare_checkpoints


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder with a checkpoint per model."""
    folder = tmp_path_factory.mktemp("checkpoints")
    prepare_checkpoints(folder)
    return str(folder)


@pytest.fixture(scope="session")
def single_process(checkpoints):
    """The one truth."""
    return measure_layout(Layout(1, {}), list(MODELS), checkpoints)[0]
