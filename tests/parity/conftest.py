"""One set of checkpoints and one truth for all tests of layouts."""

import pytest
import torch

from tests.parity.layouts import MODELS, Layout, measure_layout, prepare_checkpoints
from tests.shared import build_once


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A folder with a checkpoint per model."""
    return str(build_once(tmp_path_factory, "checkpoints", prepare_checkpoints))


@pytest.fixture(scope="session")
def single_process(checkpoints, tmp_path_factory):
    """The one truth."""

    def build(folder):
        (measured,) = measure_layout(Layout(1, {}), list(MODELS), checkpoints)
        torch.save(measured, folder / "measured.pt")

    folder = build_once(tmp_path_factory, "single_process", build)
    return torch.load(folder / "measured.pt", weights_only=False)
