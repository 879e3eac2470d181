"""One set of checkpoints and one truth for all tests of layouts."""

import pytest

from tests.parity.layouts import (
    MODELS,
    NUM_STEPS_OF_MATRIX,
    Layout,
    measure_layout,
    prepare_checkpoints,
)


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


@pytest.fixture(scope="session")
def single_process_of_matrix(checkpoints):
    """The same, with as many steps as the whole matrix takes."""
    return measure_layout(Layout(1, {}), list(MODELS), checkpoints, NUM_STEPS_OF_MATRIX)[0]
