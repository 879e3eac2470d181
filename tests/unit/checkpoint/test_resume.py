"""A run that stops and goes on is the run that never stopped; other layouts can take it over."""

import math
from pathlib import Path

import pytest
import torch

from megatron_ponder.checkpoint import storage
from megatron_ponder.checkpoint.reader import check_finite, load_checkpoint, locate
from megatron_ponder.config.parse import parse_args
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.resolved import ResolvedConfig
from megatron_ponder.errors import CheckpointError
from megatron_ponder.optim.adamw import learning_rate
from tests.parity.layouts import CP2, DIST_OPT, GPT2, PP2, SP, TP2, VP2, Layout
from tests.ranks import run_ranks
from tests.unit.checkpoint.small_run import (
    build_training_state,
    parts,
    resume,
    run_iterations,
    save_midway,
    small_config,
)

pytestmark = pytest.mark.thorough

SLOW = pytest.mark.slow
SAVED_AT = 2
LAST = 4
BF16 = {"bf16": True}
OVERLAP = DIST_OPT | {"overlap_grad_reduce": True, "overlap_param_gather": True}
MIXING = {"method": "ponderlm", "num_latent_thoughts": 2, "num_layers": 4}


LAYOUTS = {
    "one": Layout(1, {}),
    "one dist": Layout(1, DIST_OPT),
    "one bf16": Layout(1, BF16),
    "one bf16 dist": Layout(1, BF16 | DIST_OPT),
    "tp2": Layout(2, TP2),
    "tp2 sp": Layout(2, TP2 | SP),
    "dp2": Layout(2, {}),
    "dp2 dist": Layout(2, DIST_OPT),
    "dp2 overlap": Layout(2, OVERLAP),
    "dp2 bf16": Layout(2, BF16),
    "dp2 bf16 dist": Layout(2, BF16 | DIST_OPT),
    "tp2 dp2 dist": Layout(4, TP2 | DIST_OPT),
    "pp2": Layout(2, PP2),
    "pp2 vp2": Layout(2, PP2 | VP2),
    "pp2 vp2 dp2 dist": Layout(4, PP2 | VP2 | DIST_OPT),
    "pp2 dp2 bf16 dist": Layout(4, PP2 | BF16 | DIST_OPT),
    "cp2 dist": Layout(2, CP2 | DIST_OPT),
    "tp2 sp pp2": Layout(4, TP2 | SP | PP2),
}


def _run(function, layout: str, folder: Path, last: int, **changes: object) -> dict:
    """Rank 0's result of a part of a run, with checkpoints in `folder`."""
    chosen = LAYOUTS[layout]
    paths = {"save": str(folder), "load": str(folder)}
    config = small_config(chosen.world_size, **chosen.settings, **paths, **changes)
    arguments = (SAVED_AT, last) if function is save_midway else (last,)
    return run_ranks(function, chosen.world_size, config, *arguments)[0]


@pytest.mark.parametrize(
    "layout",
    [
        "one",
        "one bf16",
        pytest.param("dp2", marks=SLOW),
        pytest.param("dp2 dist", marks=SLOW),
        "dp2 bf16 dist",
        pytest.param("tp2 sp", marks=SLOW),
        "tp2 dp2 dist",
        "pp2 vp2 dp2 dist",
        "cp2 dist",
        "dp2 overlap",
    ],
)
def test_resume_is_exact_on_one_layout(layout: str, tmp_path: Path) -> None:
    whole = _run(save_midway, layout, tmp_path, LAST)
    resumed = _run(resume, layout, tmp_path, LAST)
    assert resumed["steps"] == whole["steps"]
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name
    assert torch.equal(resumed["draw"], whole["draw"])


def _resume_longer(run_config: str, folder: str) -> tuple[ResolvedConfig, int, float]:
    """Twice as long through the stored file: the config, the end of the decay, and the last LR."""
    more = ["--config", run_config, "--load", folder, "--train-iters", "16"]
    config = resolve(parse_args(more, prog="test"), world_size=1)
    training_state = build_training_state(config)
    progress = load_checkpoint(config, locate(Path(folder)), **parts(training_state))
    run_iterations(config, training_state, progress, LAST)
    found = config, training_state.scheduler.lr_decay_steps, learning_rate(training_state.optimizer)
    return found


def test_the_stored_settings_let_a_run_become_longer(tmp_path: Path) -> None:
    """The LR decay ends with the longer run, as if the first command had been given again."""
    _run(save_midway, "one", tmp_path, SAVED_AT)
    stored = storage.iteration_folder(tmp_path, SAVED_AT) / storage.CONFIG_FILE
    config, decay_iters, rate = run_ranks(_resume_longer, 1, str(stored), str(tmp_path))[0]
    assert config == small_config(train_iters=16, save=str(tmp_path), load=str(tmp_path))
    assert decay_iters == 16
    lowest, highest = config.optimizer.min_lr, config.optimizer.lr
    decayed = 0.5 * (1 + math.cos(math.pi * LAST / 16))
    assert rate == pytest.approx(lowest + decayed * (highest - lowest))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("one", "tp2"),
        pytest.param("dp2 overlap", "one", marks=SLOW),
        pytest.param("one", "dp2 dist", marks=SLOW),
        pytest.param("tp2", "one", marks=SLOW),
        pytest.param("dp2 dist", "one", marks=SLOW),
        ("dp2 dist", "tp2 dp2 dist"),
        pytest.param("dp2 bf16 dist", "one bf16", marks=SLOW),
        pytest.param("one bf16", "dp2 bf16 dist", marks=SLOW),
        ("one", "pp2 vp2 dp2 dist"),
        ("pp2 vp2 dp2 dist", "tp2 sp pp2"),
        ("tp2 sp pp2", "cp2 dist"),
        ("cp2 dist", "pp2"),
        pytest.param("pp2", "dp2 dist", marks=SLOW),
        pytest.param("pp2 dp2 bf16 dist", "one bf16", marks=SLOW),
    ],
)
def test_another_layout_goes_on(before: str, after: str, tmp_path: Path) -> None:
    _check_that_it_goes_on(before, after, tmp_path)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("one", "pp2 vp2 dp2 dist"),
        pytest.param("pp2", "cp2 dist", marks=SLOW),
        pytest.param("tp2 sp pp2", "one", marks=SLOW),
    ],
)
def test_tied_embeddings_go_on(before: str, after: str, tmp_path: Path) -> None:
    _check_that_it_goes_on(before, after, tmp_path, **GPT2)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("one", "pp2 vp2 dp2 dist"),
        pytest.param("pp2 vp2 dp2 dist", "tp2", marks=SLOW),
        pytest.param("pp2", "pp2", marks=SLOW),
        ("pp2 dp2 bf16 dist", "one bf16"),
    ],
)
def test_an_embedding_on_two_stages_goes_on(before: str, after: str, tmp_path: Path) -> None:
    """A method that mixes embeddings has the table on the last stage too."""
    _check_that_it_goes_on(before, after, tmp_path, **MIXING)


def _check_that_it_goes_on(before: str, after: str, folder: Path, **changes: object) -> None:
    """One run saves and trains on; another layout loads and trains the same iterations."""
    whole = _run(save_midway, before, folder, LAST, **changes)
    resumed = _run(resume, after, folder, LAST, **changes)
    expected = [step.loss for step in whole["steps"]]
    losses = [step.loss for step in resumed["steps"]]
    is_bf16 = LAYOUTS[after].settings.get("bf16", False)
    assert losses == pytest.approx(expected, abs=2e-2 if is_bf16 else 1e-5)
    # The rate of the schedule and R go on too, and the losses are those of a trained model.
    for old, new in zip(whole["steps"], resumed["steps"], strict=True):
        assert new.learning_rate == old.learning_rate
        assert new.num_jacobi_iterations == old.num_jacobi_iterations


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    layers = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 3)]
    check_finite(tmp_path, layers)
    with torch.no_grad():
        layers[1].weight[2, 1] = value
    with pytest.raises(CheckpointError, match="1 of 4 weights hold NaN or infinity.*--ckpt-step"):
        check_finite(tmp_path, layers)
