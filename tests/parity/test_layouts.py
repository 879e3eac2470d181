"""Every layout gives the numbers of one process.

One checkpoint is loaded everywhere. Each layout's ranks start once and run every model; see
tests/parity/measure.py for what is compared and tolerances.py for how closely. `make test` runs a
part of the matrix that has every layout and every model in it, `make test-all` the whole.
"""

import pytest

from megatron_ponder.config.schema import RunConfig
from tests.parity.layouts import (
    DIST_OPT,
    LAYOUTS,
    MODELS,
    NUM_STEPS,
    PP2,
    RECOMPUTE,
    TIMEOUT_S,
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


OF_THOUGHTS = ("llama k2", "gpt2 k2")
FAULTS = {
    "DP2": {
        OF_THOUGHTS: [
            *("shifted label", "position per slot", "skipped norm", "loss at first stage"),
        ]
    },
    "TP2": {
        OF_THOUGHTS: ["unscaled embedding", "one pass short"],
        ("llama ponderlm",): ["mixture of the own shard"],
        ("qwen3 k1",): ["head norm gradients not summed"],
    },
    "TP2 + SP": {
        OF_THOUGHTS: ["norm gradients not summed"],
        ("neox ponderlm of 5",): ["unscaled mixture"],
        ("llama pause",): ["unscaled pause"],
    },
    "PP2": {
        OF_THOUGHTS: ["carry of another micro-batch"],
        ("gpt2 k2",): ["tied gradients not summed"],
        ("llama mixtures",): ["replicated gradients not summed"],
        ("gpt2 ponderlm",): ["mixture without gradient to embeddings"],
        ("llama ponderlm accumulating",): ["lost input", "carry of another micro-batch"],
    },
    "CP2": {
        OF_THOUGHTS: ["shards taken as contiguous", "keys of the own shard only"],
        ("gpt2 loop",): ["positions in every loop", "norm in every loop"],
    },
}
"""Of each layout: models, and what the comparison must catch on each of them."""


def measure_faults(runs: list[tuple[str, RunConfig, str]], folder: str) -> list[Measured]:
    """Measure a model per planted fault (inside a rank)."""
    return [
        measure(config, f"{folder}/{model}", batch(), NUM_STEPS, fault)
        for model, config, fault in runs
    ]


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_caught(name, checkpoints, single_process):
    """The comparison above has teeth."""
    layout = LAYOUTS[name]
    runs = [
        (model, config_of(model, layout.settings, layout.world_size), fault)
        for models, faults in FAULTS[name].items()
        for model in models
        for fault in faults
    ]
    measured = run_ranks(measure_faults, layout.world_size, runs, checkpoints, timeout_s=TIMEOUT_S)
    missed = [
        f"{model}: {fault}"
        for (model, _, fault), numbers in zip(runs, measured[0], strict=True)
        if not violations(numbers, single_process[model])
    ]
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
