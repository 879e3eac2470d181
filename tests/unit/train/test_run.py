"""Which datasets a run reads."""

from types import SimpleNamespace

import pytest

from megatron_ponder.train import run
from tests.unit.checkpoint.small_run import small_config

DATASETS = (object(), object(), object())


@pytest.mark.parametrize(
    ("eval_iters", "eval_interval", "validates", "tests"),
    [(2, 5, True, True), (2, 0, False, True), (0, 5, False, False), (0, 0, False, False)],
)
def test_what_is_evaluated(
    eval_iters: int,
    eval_interval: int,
    validates: bool,
    tests: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Validation needs iterations and an interval; the test at the end only iterations."""
    here = SimpleNamespace(data_parallel_rank=0, data_parallel_size=1)
    monkeypatch.setattr(run, "ranks", lambda: here)
    config = small_config(eval_iters=eval_iters, eval_interval=eval_interval)
    data = run._training_data(config, DATASETS, {}, 0)
    assert (data.valid is not None, data.test is not None) == (validates, tests)
    by_name = run._training_data(config, DATASETS, {"a": object()}, 0)
    assert by_name.valid is None and list(by_name.validation_sets) == ["a"] * validates
    without = run._training_data(config, (object(), None, None), {}, 0)
    assert without.valid is None and without.test is None
