"""Our model against the authors' code: logits, loss, every gradient; TP 1, TP 2 with SP, PP 2.

Weights come in by Hugging Face name through our own tables and a checkpoint, gradients go back out
through them. Planted faults must be caught.
"""

import pytest
import torch

from megatron_ponder.convert.weight_names import to_huggingface, to_megatron
from megatron_ponder.model.build import build_model_chunks
from megatron_ponder.parallel.parallel_model import wrap_data_parallel
from megatron_ponder.parallel.schedule import all_reduce_totals, run_microbatches
from megatron_ponder.runtime import distributed
from tests.golden.cases import NAMES, Case, load_case
from tests.parity.faults import FAULTS
from tests.parity.measure import gather_gradients, gather_logits, load_weights, save_weights
from tests.parity.tolerances import (
    GOLDEN_GRADIENT_RELATIVE,
    LOGITS_ABSOLUTE,
    LOSS_ABSOLUTE,
    gradient_violations,
    largest_difference,
)
from tests.ranks import run_ranks

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2, "global_batch_size": 2}
LAYOUTS = {
    "tp1": (1, {}),
    "tp2": (2, TP2),
    "tp2 sp": (2, TP2 | {"sequence_parallel": True}),
    "pp2": (2, PP2),
}
THOUGHTS = "llama_ponderlm2_k2_j2"
# Without thoughts there is nothing to leave out or misplace.
CATCHABLE = {
    THOUGHTS: [
        "shifted label",
        "position per slot",
        "skipped norm",
        "loss at first stage",
        "unscaled embedding",
        "one pass short",
    ],
    "gpt2_vanilla": ["shifted label"],
    "llama_ponderlm_k2": [
        "skipped norm",
        "unscaled embedding",
        "unscaled mixture",
        "mixture without gradient to embeddings",
    ],
    "gpt_neox_ponderlm_k2": ["skipped norm", "lost input"],
    "llama_loop_k2": ["unscaled embedding", "norm in every loop"],
    "llama_pause_k2": ["unscaled pause", "position per slot", "loss at first stage"],
}
IN_ONE_FORWARD = ["one pass short"]
"""Faults of running all passes on one stage."""
OF_SHARDS = {"llama_ponderlm_k2": ["mixture of the own shard"]}
"""Faults of tensor parallelism."""


def violations(case: Case, checkpoint: str, fault: str | None = None) -> list[str]:
    """Run a case on this layout (inside a rank) and say where it differs."""
    distributed.initialize(case.config.parallel, seed=1)
    modules = build_model_chunks(case.config)
    load_weights(modules, checkpoint)
    if fault is not None:
        for module in modules:
            FAULTS[fault](module)
    model = wrap_data_parallel(modules, case.config)
    plan = model.method.plan(case.config.method.num_jacobi_iterations)
    logits = gather_logits(model, case.config, case.input_ids, plan)
    # Hugging Face's shift: the last token has no label.
    loss_mask = torch.ones(case.input_ids.shape)
    loss_mask[:, -1] = 0
    batch = {
        "tokens": case.input_ids,
        "labels": case.input_ids.roll(-1, dims=1),
        "loss_mask": loss_mask,
    }
    size = case.input_ids.size(0)
    totals = run_microbatches(
        model,
        iter([{name: t[i : i + 1] for name, t in batch.items()} for i in range(size)]),
        plan=plan,
        num_microbatches=size,
        micro_batch_size=1,
        seq_length=case.input_ids.size(1),
    )
    totals = all_reduce_totals(totals)
    gradients = to_huggingface(gather_gradients(model), case.config.model)
    found = []
    if (difference := largest_difference(logits, case.logits)) > LOGITS_ABSOLUTE:
        found.append(f"logits: {difference:.2e}")
    if not abs(float(totals[0] / totals[1]) - case.loss) <= LOSS_ABSOLUTE:
        found.append(f"loss: {float(totals[0] / totals[1])} against {case.loss}")
    return found + gradient_violations(gradients, case.gradients, GOLDEN_GRADIENT_RELATIVE)


def write_checkpoints(folder: str) -> None:
    """Convert every case's weights at one rank."""
    for name in NAMES:
        case = load_case(name)
        save_weights(case.config, to_megatron(case.weights, case.config.model), f"{folder}/{name}")


def violations_of_all(folder: str, settings: dict) -> dict[str, list[str]]:
    """Every case on one layout."""
    return {name: violations(load_case(name, **settings), f"{folder}/{name}") for name in NAMES}


def faults_caught(folder: str, settings: dict) -> dict[str, list[str]]:
    """Every planted fault on one layout."""
    is_sharded = settings.get("tensor_model_parallel_size", 1) > 1
    is_pipelined = settings.get("pipeline_model_parallel_size", 1) > 1
    return {
        f"{name}, {fault}": violations(load_case(name, **settings), f"{folder}/{name}", fault)
        for name, faults in CATCHABLE.items()
        for fault in faults + (OF_SHARDS.get(name, []) if is_sharded else [])
        if not (is_pipelined and fault in IN_ONE_FORWARD)
    }


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A folder with a checkpoint per case."""
    folder = tmp_path_factory.mktemp("golden")
    for name in NAMES:
        (folder / name).mkdir()
    run_ranks(write_checkpoints, 1, str(folder))
    return str(folder)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_the_authors_code(layout, checkpoints):
    """All fourteen cases of the five methods."""
    assert len(NAMES) == 14
    world_size, settings = LAYOUTS[layout]
    for found in run_ranks(violations_of_all, world_size, checkpoints, settings):
        assert not any(found.values()), found


@pytest.mark.parametrize("layout", ["tp1", "tp2 sp", "pp2"])
def test_planted_faults_are_caught(layout, checkpoints):
    """Each fault shows in at least one number."""
    world_size, settings = LAYOUTS[layout]
    caught = run_ranks(faults_caught, world_size, checkpoints, settings)[0]
    assert all(caught.values()), [fault for fault, found in caught.items() if not found]


def test_weight_names_round_trip():
    """Hugging Face -> ours -> Hugging Face is bit-identical for every weight."""
    for name in NAMES:
        case = load_case(name)
        state = to_huggingface(to_megatron(case.weights, case.config.model), case.config.model)
        repeated = case.weights.keys() - state.keys()
        assert repeated <= {"lm_head.weight"}
        assert all(torch.equal(state[key], case.weights[key]) for key in state)
