"""What several passes could get wrong in a layout, beyond the matrix.

A number of passes that changes from step to step, passes without a gradient, shards of a sequence
with unequal numbers of tokens in the loss, and communication that overlaps with computation: which
overlaps are exact, and the silent error of one that is not.
"""

import functools

import pytest
import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from megatron_ponder.errors import ConfigError
from megatron_ponder.parallel import parallel_model
from megatron_ponder.ponder.method import load_method
from tests.parity.layouts import (
    CP2,
    DIST_OPT,
    GLOBAL_BATCH_SIZE,
    NUM_STEPS,
    PAIRS,
    PP2,
    SEQ_LENGTH,
    SP,
    TP2,
    VP2,
    Layout,
    batch,
    config_of,
)
from tests.parity.measure import Measured, measure
from tests.parity.tolerances import violations
from tests.ranks import RanksFailed, run_ranks

CHANGING_R = (2, 0, 3)
assert len(CHANGING_R) == NUM_STEPS
MORE_PASSES = (1, 3, 3)
OVERLAP = {"overlap_grad_reduce": True}
OVERLAP_ALL = OVERLAP | DIST_OPT | {"overlap_param_gather": True}
OVERLAP_P2P = {"overlap_p2p_communication": True}
RANDOM_R = {"random_jacobi_iterations": True, "min_jacobi_iterations": 0}
PASSES = {"recompute_granularity": "pass"}
SLOW = pytest.mark.slow


def measured(model: str, layout: Layout, folder: str, **options) -> list[Measured]:
    """A model on a layout, by rank."""
    config = config_of(model, layout.settings, layout.world_size)
    return run_ranks(_measure, layout.world_size, config, f"{folder}/{model}", options)


def _measure(config, folder: str, options: dict) -> Measured:
    return measure(config, folder, batch(), NUM_STEPS, **options)


def assert_layouts_equal(model: str, settings: dict, layouts: dict, folder: str, **options):
    """Layouts against one process, all with the same further settings."""
    (truth,) = measured(model, Layout(1, settings), folder, **options)
    for name, layout in layouts.items():
        wider = Layout(layout.world_size, layout.settings | settings)
        for numbers in measured(model, wider, folder, **options):
            assert not violations(numbers, truth), name


@pytest.mark.parametrize("model", ["llama k2", pytest.param("gpt2 k1", marks=SLOW)])
def test_the_number_of_passes_changes_from_step_to_step(model, checkpoints):
    layouts = {
        "PP2": Layout(2, PP2),
        "PP2, 2 virtual, overlapped": Layout(2, PP2 | VP2 | OVERLAP_P2P),
        "PP2 x CP2, recomputed": Layout(4, PP2 | CP2 | PASSES),
    }
    assert_layouts_equal(model, {}, layouts, checkpoints, jacobi_iterations=CHANGING_R)


@pytest.mark.parametrize(
    ("model", "num_passes"),
    [
        ("llama k2", 1),
        ("gpt2 k1", 2),
        pytest.param("llama k2", 2, marks=SLOW),
        pytest.param("gpt2 k1", 1, marks=SLOW),
    ],
)
def test_passes_without_a_gradient(model, num_passes, checkpoints, single_process):
    """The last n passes have one, on every kind of layout; and it is another gradient than all."""
    settings = {"jacobi_grad_passes": num_passes}
    layouts = {
        "TP2": Layout(2, TP2),
        "PP2": Layout(2, PP2),
        "PP2, 2 virtual, overlapped": Layout(2, PP2 | VP2 | OVERLAP_P2P),
        "recomputed": Layout(1, PASSES),
    }
    assert_layouts_equal(model, settings, layouts, checkpoints)
    (cut,) = measured(model, Layout(1, settings), checkpoints)
    whole = single_process[model]
    assert torch.equal(cut.logits, whole.logits) and cut.losses[0] == whole.losses[0]
    assert violations(cut, whole)


def test_as_many_gradient_passes_as_passes_are_all(checkpoints, single_process):
    (cut,) = measured("llama k1", Layout(1, {"jacobi_grad_passes": 4}), checkpoints)
    whole = single_process["llama k1"]
    assert torch.equal(cut.logits, whole.logits)
    assert all(torch.equal(cut.gradients[n], g) for n, g in whole.gradients.items())


def test_shards_with_unequal_numbers_of_tokens(checkpoints):
    """The loss is a mean over the tokens of the global batch, wherever they lie."""
    mask = torch.ones(GLOBAL_BATCH_SIZE, SEQ_LENGTH)
    mask[0, :10] = 0  # most of the front of one sequence, all of one rank's first chunks
    mask[1] = 0
    mask[3, 12:] = 0
    layouts = {
        "CP2": Layout(2, CP2 | PAIRS),
        "DP2": Layout(2, {}),
        "PP2 x CP2": Layout(4, PP2 | CP2),
        "TP2 + SP x CP2": Layout(4, TP2 | SP | CP2 | PAIRS),
    }
    assert_layouts_equal("llama k1", {}, layouts, checkpoints, loss_mask=mask)


OVERLAPPED = {
    "DP2": (Layout(2, OVERLAP), CHANGING_R),
    "DP2, weights too": (Layout(2, OVERLAP_ALL), CHANGING_R),
    "DP2, recomputed": (Layout(2, OVERLAP_ALL | PASSES), ()),
    "PP2 x DP2": (Layout(4, PP2 | OVERLAP_ALL | OVERLAP_P2P), ()),
    "PP2, 2 virtual x DP2": (Layout(4, PP2 | VP2 | OVERLAP_ALL), ()),
}


@pytest.mark.parametrize("name", OVERLAPPED)
@pytest.mark.parametrize("model", ["llama k1", pytest.param("gpt2 k2", marks=SLOW)])
def test_overlapped_communication_is_exact(name, model, checkpoints):
    """Where it is allowed; with one graph per micro-batch even if the number of passes changes."""
    layout, jacobi_iterations = OVERLAPPED[name]
    layouts = {name: layout}
    assert_layouts_equal(model, {}, layouts, checkpoints, jacobi_iterations=jacobi_iterations)


REFUSED = {
    "recomputed": Layout(2, OVERLAP | RANDOM_R | PASSES),
    "pipelined": Layout(4, OVERLAP | RANDOM_R | PP2),
}


@pytest.mark.parametrize("name", REFUSED)
def test_overlap_that_would_be_wrong_is_refused(name, checkpoints):
    with pytest.raises(RanksFailed, match="before a gradient is complete"):
        measured("llama k1", REFUSED[name], checkpoints)


def test_the_silent_error_that_refusing_prevents(checkpoints):
    """Unchecked, a pipeline's step with more passes than the first loses gradients, unnoticed."""
    (truth,) = measured("llama k1", Layout(1, RANDOM_R), checkpoints, jacobi_iterations=MORE_PASSES)
    found = _measured_unchecked(REFUSED["pipelined"], checkpoints)[0]
    assert found.losses[0] == pytest.approx(truth.losses[0], abs=1e-5)
    assert found.grad_norms[0] == pytest.approx(truth.grad_norms[0], rel=1e-5)
    assert any("gradient norm of step 1" in line for line in violations(found, truth))


def test_the_crash_that_refusing_prevents(checkpoints):
    """Unchecked, recomputation ends the run: the embedding's gradient comes after all passes."""
    with pytest.raises(RanksFailed, match="Communication call has not been issued"):
        _measured_unchecked(REFUSED["recomputed"], checkpoints)


def _measured_unchecked(layout: Layout, folder: str) -> list[Measured]:
    config = config_of("llama k1", layout.settings, layout.world_size)
    options = {"jacobi_iterations": MORE_PASSES}
    folder = f"{folder}/llama k1"
    return run_ranks(_measure_unchecked, layout.world_size, config, folder, options)


def _measure_unchecked(config, folder: str, options: dict) -> Measured:
    """Without the check, with several buckets of gradients, as a large model has, and a network so
    fast that a reduction ends before the backward goes on (else the error would be a race)."""
    start = _ParamAndGradBucketGroup.start_grad_sync

    def start_and_wait(group, *args, **kwargs):
        start(group, *args, **kwargs)
        if group.grad_reduce_handle is not None:
            group.grad_reduce_handle.wait()

    _ParamAndGradBucketGroup.start_grad_sync = start_and_wait
    parallel_model.check_hook_counts = lambda *unused: None
    parallel_model.DistributedDataParallelConfig = functools.partial(
        parallel_model.DistributedDataParallelConfig, bucket_size=1000
    )
    return measure(config, folder, batch(), NUM_STEPS, **options)


def test_the_check_itself_knows_when_the_count_is_fixed():
    """Refused is only what changes, not a fixed R or a fixed number of passes with a gradient."""
    fixed = config_of("llama k1", OVERLAP | PASSES, 2)
    limited = config_of("llama k1", OVERLAP | PASSES | RANDOM_R | {"jacobi_grad_passes": 2}, 2)
    changing = config_of("llama k1", OVERLAP | PASSES | RANDOM_R, 2)
    one_graph = config_of("llama k1", OVERLAP | RANDOM_R, 2)
    vanilla = config_of("llama vanilla", OVERLAP | PASSES | RANDOM_R, 2)
    for allowed in (fixed, limited, one_graph, vanilla):
        parallel_model.check_hook_counts(allowed, load_method(allowed.method))
    with pytest.raises(ConfigError, match="from 2 to 5"):
        parallel_model.check_hook_counts(changing, load_method(changing.method))


def test_the_check_knows_whether_the_embedding_gets_a_gradient():
    """A pass whose input is nothing but a constant carry gives it none."""
    one_pass = OVERLAP | {"jacobi_grad_passes": 1}
    for model in ("llama k1", "llama pause", "gpt2 vanilla"):
        config = config_of(model, one_pass, 2)
        parallel_model.check_hook_counts(config, load_method(config.method))
    for model in ("llama loop", "neox ponderlm hidden", "llama ponderlm", "gpt2 mixtures of 5"):
        config = config_of(model, one_pass, 2)
        with pytest.raises(ConfigError, match="a gradient that never comes"):
            parallel_model.check_hook_counts(config, load_method(config.method))
        whole = config_of(model, OVERLAP, 2)
        parallel_model.check_hook_counts(whole, load_method(whole.method))
