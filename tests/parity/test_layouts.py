"""Every layout gives the numbers of one process.

One checkpoint is loaded everywhere. Each layout's ranks start once and run every model; see
tests/parity/measure.py for what is compared and tolerances.py for how closely. `make test` runs a
part of the matrix that has every layout and every model in it, `make test-all` the whole.
"""

import pytest

from tests.parity.layouts import (
    DIST_OPT,
    LAYOUTS,
    MODELS,
    NUM_STEPS,
    PP2,
    RECOMPUTE,
    VP2,
    Layout,
    batch,
    config_of,
    measure_layout,
)
from tests.parity.measure import Measured, measure
from tests.parity.tolerances import violations
from tests.ranks import run_ranks

SHARDED = ["qwen3 k1", "llama3 k1", "neox k1", "gpt2 mixtures of 5", "llama pause"]
REPRESENTATIVE = {
    "TP2": [m for m in MODELS if m not in SHARDED],
    "PP2": [
        *("llama k1", "neox k1", "gpt2 vanilla", "gpt2 k2", "llama mixtures", "gpt2 mixtures of 5"),
        *("llama ponderlm", "gpt2 ponderlm", "llama ponderlm accumulating", "neox ponderlm hidden"),
        *("gpt2 ponderlm hidden", "gpt2 loop", "llama pause", "gpt2 pause"),
    ],
    "CP2": [
        *(
            "llama k2",
            "qwen3 k1",
            "llama3 k1",
            "neox vanilla",
            "neox k1",
            "gpt2 vanilla",
            "gpt2 k2",
        ),
        *("llama mixtures", "llama ponderlm", "gpt2 loop", "neox pause", "gpt2 pause"),
    ],
    "PP4": ["llama k2", "gpt2 k1", "llama ponderlm accumulating"],
    "TP2 + SP": ["llama k2", "gpt2 vanilla", *SHARDED],
    "PP2, 2 virtual": ["llama k2", "gpt2 vanilla", "llama ponderlm", "neox ponderlm hidden"],
    "TP2 + SP x PP2 x DP2 + dist-opt": ["gpt2 k2", "llama ponderlm"],
}
"""What `make test` runs of each layout; of those not named here, one model of each kind.

Tensor parallelism, with sequence shards or without, sees every model. A pipeline sees methods and
tied embeddings, not the kind of layer; context parallelism sees attention, positions and where a
method puts its slots.
"""
OF_EACH_KIND = ["llama k2", "neox k1", "gpt2 vanilla"]
COMBINED = ["llama k2", "gpt2 vanilla"]
"""On layouts of several axes, each of which runs alone as well."""
RECOMPUTED = [*OF_EACH_KIND, "llama mixtures", "llama ponderlm accumulating", "gpt2 loop"]
SLOW = pytest.mark.slow


def assert_equal(measured: list[dict[str, Measured]], truth: dict[str, Measured], name: str):
    for rank, by_model in enumerate(measured):
        for model, numbers in by_model.items():
            found = violations(numbers, truth[model])
            assert not found, f"{name}, {model}, rank {rank}: " + "; ".join(found)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_single_process(name, checkpoints, single_process):
    """Logits, loss, gradient norms, every gradient and the weights after three steps."""
    models = REPRESENTATIVE.get(name, OF_EACH_KIND if "x" not in name.split() else COMBINED)
    assert_equal(measure_layout(LAYOUTS[name], models, checkpoints), single_process, name)


CHEAPLY = {
    "selective": {"recompute_granularity": "selective"},
    "1 pass": {"recompute_granularity": "pass", "recompute_num_passes": 1},
}
"""Recomputation that the matrix leaves out."""


@pytest.mark.parametrize("recompute", ["full", "pass", *CHEAPLY])
@pytest.mark.parametrize("layout", [Layout(1, {}), Layout(2, PP2 | VP2)], ids=["alone", "PP2 VP2"])
def test_recomputation_equals_keeping(layout, recompute, checkpoints, single_process):
    settings = layout.settings | (RECOMPUTE | CHEAPLY)[recompute]
    models = RECOMPUTED if layout.world_size == 1 else ["llama mixtures", "gpt2 loop"]
    measured = measure_layout(Layout(layout.world_size, settings), models, checkpoints)
    assert_equal(measured, single_process, f"recompute {recompute}")


@pytest.mark.parametrize("name", ["TP2 + SP", "CP2", "DP2 + dist-opt"])
def test_selective_recomputation_on_layouts(name, checkpoints, single_process):
    """With everything overlapped where there are replicas: a random R is no obstacle here."""
    layout = LAYOUTS[name]
    overlaps = {"overlap_grad_reduce": True, "overlap_param_gather": True}
    settings = layout.settings | CHEAPLY["selective"] | (overlaps if "DP2" in name else {})
    measured = measure_layout(Layout(2, settings), OF_EACH_KIND, checkpoints)
    assert_equal(measured, single_process, name)


@SLOW
@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("name", LAYOUTS)
def test_whole_matrix(name, recompute, checkpoints, single_process):
    layout = LAYOUTS[name]
    settings = layout.settings | RECOMPUTE[recompute]
    measured = measure_layout(Layout(layout.world_size, settings), list(MODELS), checkpoints)
    assert_equal(measured, single_process, f"{name}, recompute {recompute}")


FAULTS_BY_LAYOUT = {
    "DP2": ["shifted label", "position per slot", "skipped norm", "loss at first stage"],
    "TP2": ["unscaled embedding", "one pass short"],
    "TP2 + SP": ["norm gradients not summed"],
    "PP2": ["carry of another micro-batch"],
    "CP2": ["shards taken as contiguous", "keys of the own shard only"],
}
FAULTS_OF_TIED_EMBEDDINGS = {"PP2": ["tied gradients not summed"]}


def measure_faults(config, faults: list[str], folder: str) -> dict[str, Measured]:
    """Measure one model once per planted fault (inside a rank)."""
    return {fault: measure(config, folder, batch(), NUM_STEPS, fault) for fault in faults}


@pytest.mark.parametrize("name", FAULTS_BY_LAYOUT)
@pytest.mark.parametrize("model", ["llama k2", "gpt2 k2"])
def test_planted_faults_are_caught(name, model, checkpoints, single_process):
    """The comparison above has teeth."""
    layout = LAYOUTS[name]
    config = config_of(model, layout.settings, layout.world_size)
    faults = FAULTS_BY_LAYOUT[name]
    if not config.model.untie_embeddings_and_output_weights:
        faults = faults + FAULTS_OF_TIED_EMBEDDINGS.get(name, [])
    measured = run_ranks(
        measure_faults, layout.world_size, config, faults, f"{checkpoints}/{model}"
    )[0]
    missed = [fault for fault in faults if not violations(measured[fault], single_process[model])]
    assert not missed, f"not caught: {missed}"


FAULTS_BY_METHOD = {
    ("TP2", "llama ponderlm"): ["mixture of the own shard"],
    ("TP2 + SP", "neox ponderlm of 5"): ["unscaled mixture"],
    ("TP2 + SP", "llama pause"): ["unscaled pause"],
    ("TP2", "qwen3 k1"): ["head norm gradients not summed"],
    ("PP2", "llama mixtures"): ["replicated gradients not summed"],
    ("PP2", "gpt2 ponderlm"): ["mixture without gradient to embeddings"],
    ("PP2", "llama ponderlm accumulating"): ["lost input", "carry of another micro-batch"],
    ("CP2", "gpt2 loop"): ["positions in every loop", "norm in every loop"],
}


@pytest.mark.parametrize(("layout", "model"), FAULTS_BY_METHOD)
def test_planted_faults_of_methods_are_caught(layout, model, checkpoints, single_process):
    """So has that of the other methods."""
    chosen, faults = LAYOUTS[layout], FAULTS_BY_METHOD[layout, model]
    config = config_of(model, chosen.settings, chosen.world_size)
    measured = run_ranks(
        measure_faults, chosen.world_size, config, faults, f"{checkpoints}/{model}"
    )[0]
    missed = [fault for fault in faults if not violations(measured[fault], single_process[model])]
    assert not missed, f"not caught: {missed}"


@pytest.mark.parametrize("model", ["llama mixtures", "gpt2 ponderlm"])
def test_mixtures_with_everything_overlapped(model, checkpoints, single_process):
    """The table of embeddings on the last stage is complete before it is mixed."""
    overlaps = ("overlap_grad_reduce", "overlap_param_gather", "overlap_p2p_communication")
    layout = Layout(4, PP2 | DIST_OPT | dict.fromkeys(overlaps, True))
    assert_equal(measure_layout(layout, [model], checkpoints), single_process, "overlapped")


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_recomputation_behind_a_constant_carry(recompute, checkpoints):
    """Methods whose input is nothing but the carry, with a gradient through the last pass only."""
    models = ["gpt2 loop", "neox ponderlm hidden", "llama ponderlm accumulating"]
    settings = {"jacobi_grad_passes": 1}
    truth = measure_layout(Layout(1, settings), models, checkpoints)[0]
    for layout in (Layout(1, settings), Layout(2, settings | PP2)):
        recomputed = Layout(layout.world_size, layout.settings | RECOMPUTE[recompute])
        assert_equal(measure_layout(recomputed, models, checkpoints), truth, recompute)
