"""What the report says, against what is known otherwise."""

import math

import pytest

from megatron_ponder.config.parse import parse_args
from megatron_ponder.config.presets import PRESETS
from megatron_ponder.errors import ConfigError
from megatron_ponder.model.size import forward_flops
from megatron_ponder.planning.flops import chunk_flops
from megatron_ponder.planning.limits import find_limits, find_remedies, recompute_choices
from megatron_ponder.planning.memory import stage_memory
from megatron_ponder.planning.options import PlanOptions
from megatron_ponder.planning.report import plan_run
from megatron_ponder.planning.run import PlannedRun
from megatron_ponder.planning.text import as_text
from tests.unit.planning.runs import ARCHITECTURES, METHODS, small_run


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("method", METHODS)
def test_chunks_share_the_whole_work(architecture: str, method: str) -> None:
    """Summed over stages and chunks, forwards are those of model/size.py."""
    layout = {"pipeline_model_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2}
    run = small_run(architecture, method, world_size=2, global_batch_size=4, **layout)
    flops = chunk_flops(run)
    whole = forward_flops(run.config.model, run.plan, run.config.data.seq_length).total
    whole *= run.config.training.micro_batch_size
    assert sum(map(sum, flops.forward)) == pytest.approx(whole)
    assert sum(map(sum, flops.backward)) == pytest.approx(2 * whole)
    assert sum(map(sum, flops.recomputed)) == 0


def test_recomputation_is_one_more_forward() -> None:
    def recomputed(**settings: object) -> float:
        return sum(map(sum, chunk_flops(small_run("llama", "K1", **settings)).recomputed))

    run = small_run("llama", "K1")
    passes = forward_flops(run.config.model, run.plan, run.config.data.seq_length).passes
    layers = [run.config.training.micro_batch_size * (p.linear + p.attention) for p in passes]
    assert recomputed(recompute_granularity="full") == pytest.approx(sum(layers))
    assert recomputed(recompute_granularity="pass") == pytest.approx(sum(layers[:-1]))
    assert recomputed(recompute_granularity="selective") == 0
    for n in range(1, len(layers) + 1):
        first = sum(layers[:-1][:n])
        found = recomputed(recompute_granularity="pass", recompute_num_passes=n)
        assert found == pytest.approx(first)
    half = recomputed(
        recompute_granularity="full", recompute_method="block", recompute_num_layers=2
    )
    assert 0.4 * sum(layers) < half < 0.6 * sum(layers)
    last_two = recomputed(recompute_granularity="pass", jacobi_grad_passes=2)
    assert last_two == pytest.approx(layers[-2])
    one_of_three = recomputed(
        recompute_granularity="pass", recompute_num_passes=1, jacobi_grad_passes=3
    )
    assert one_of_three == pytest.approx(layers[-3])


def test_report_of_a_pipeline() -> None:
    run = small_run(
        "gpt2", "K1", world_size=8, pipeline_model_parallel_size=4, global_batch_size=16
    )
    result = plan_run(PlanOptions(world_size=8, device_memory_gib=0.001), run)
    assert result["step"]["num_microbatches"] == 4 == result["schedule"]["num_microbatches"]
    assert result["ranks"]["data_parallel"] == 2
    assert result["schedule"]["num_chunks"] == 4 == len(result["passes"])
    assert 0 < result["schedule"]["bubble_if_chunks_were_equal"] < result["schedule"]["bubble"] < 1
    assert math.isclose(sum(row["share"] for row in result["passes"]), 1)
    alive = [row["num_alive"] for row in result["memory"]]
    assert alive == sorted(alive, reverse=True) and alive[0] > alive[-1]
    assert not result["fits"]
    by_change = {row["change"]: row["total_gib"] for row in result["remedies"]}
    assert by_change["--recompute-granularity pass"] < result["memory"][0]["total_gib"]
    text = as_text(result)
    assert "DOES NOT FIT" in text and "4 pipeline chunks x 4 micro-batches" in text


def test_memory_falls_with_recomputation_and_with_fewer_gradients() -> None:
    def activations(**settings: object) -> int:
        (stage,) = stage_memory(small_run("llama", "K2", **settings))
        return stage.activations

    everything = activations()
    by_pass = activations(recompute_granularity="pass")
    by_layer = activations(recompute_granularity="full")
    assert by_layer < by_pass < everything
    assert activations(jacobi_grad_passes=1) < activations(jacobi_grad_passes=2) < everything


def test_the_text_tells_which_passes_have_a_gradient() -> None:
    run = small_run("llama", "K1", jacobi_grad_passes=1)
    lines = as_text(plan_run(PlanOptions(world_size=1), run)).splitlines()
    first = next(number for number, line in enumerate(lines) if "slots/token" in line) + 1
    rows = [line.split() for line in lines[first : first + 4]]
    # pass, slots, output slots, gradient
    assert [row[:4] for row in rows] == [
        ["1", "1", "0", "no"],
        ["2", "2", "0", "no"],
        ["3", "2", "0", "no"],
        ["4", "2", "1", "yes"],
    ]


def test_random_r_is_planned_for_its_largest() -> None:
    run = small_run("llama", "K1", random_jacobi_iterations=True)
    result = plan_run(PlanOptions(world_size=1), run)
    assert result["num_jacobi_iterations"] == {"planned_for": 3, "drawn_from": [2, 3]}
    assert len(result["passes"]) == 5
    fixed = [
        plan_run(PlanOptions(world_size=1), small_run("llama", "K1", num_jacobi_iterations=r))
        for r in (2, 3)
    ]
    mean = sum(one["step"]["training_flops"] for one in fixed) / 2
    assert result["step"]["training_flops"] == pytest.approx(mean)
    assert result["memory"] == fixed[1]["memory"]


def test_limits() -> None:
    run = small_run(
        "llama", "K1", world_size=8, pipeline_model_parallel_size=2, global_batch_size=16
    )
    found = {limit["name"]: limit for limit in find_limits(run)}
    most = {name: (limit["now"], limit["most"], limit["binds"]) for name, limit in found.items()}
    assert most["tensor_model_parallel_size"] == (1, 2, False)  # two key/value heads
    assert most["pipeline_model_parallel_size"] == (2, 4, False)  # four layers
    assert most["context_parallel_size"] == (1, 4, False)
    assert most["data_parallel_size"] == (4, 4, True)  # 8 micro-batches, 2 stages
    assert "4: --num-query-groups 2" in found["tensor_model_parallel_size"]["why"]
    assert "8: --num-layers 4" in found["pipeline_model_parallel_size"]["why"]
    assert found["context_parallel_size"]["why"] == "no data-parallel ranks are left"


def test_limits_know_what_training_refuses() -> None:
    """Uneven ends and sequence parallelism, which divisors of the model do not tell."""
    uneven = {"pipeline_model_parallel_size": 2, "decoder_first_pipeline_num_layers": 3}
    run = small_run("llama", "K1", world_size=8, global_batch_size=16, **uneven)
    found = {limit["name"]: limit["most"] for limit in find_limits(run)}
    assert found["pipeline_model_parallel_size"] == 2
    sharded = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "seq_length": 36}
    run = small_run("gpt2", "K1", world_size=8, **sharded)
    found = {limit["name"]: limit["most"] for limit in find_limits(run)}
    assert found["tensor_model_parallel_size"] == 4


def test_what_a_run_can_recompute() -> None:
    """Some of the passes before the last, those that have a gradient, or all of them."""
    plan = small_run("llama", "K2").plan
    by_pass = {"recompute_granularity": "pass"}
    for num_grad_passes, some in ((None, [1, 2]), (3, [1]), (2, []), (1, [])):
        choices = list(recompute_choices(plan.with_grad_passes(num_grad_passes)))
        assert choices == [
            {"recompute_granularity": "selective"},
            *({**by_pass, "recompute_num_passes": n} for n in some),
            by_pass,
            {"recompute_granularity": "full"},
        ]


def test_remedies_change_something() -> None:
    """What the run has already, and what it cannot have, is not offered."""
    found = {r["change"] for r in find_remedies(small_run("llama", "K1", world_size=2), 0)}
    assert found >= {
        "--bf16",
        "--use-distributed-optimizer",
        "--micro-batch-size 1",
        "--tensor-model-parallel-size 2 --sequence-parallel",
        "--recompute-granularity pass --recompute-num-passes 2",
    }
    settings = {"micro_batch_size": 1, "bf16": True, "use_distributed_optimizer": True}
    run = small_run("llama", "K1", world_size=2, recompute_granularity="full", **settings)
    fewer = {remedy["change"] for remedy in find_remedies(run, 0)}
    offered = " ".join(fewer)
    for flag in ("--bf16", "--use-distributed", "--micro-batch-size", "--recompute-granularity f"):
        assert flag not in offered
    assert fewer < found


def test_refuses_an_overlap_that_training_refuses() -> None:
    settings = {"overlap_grad_reduce": True, "random_jacobi_iterations": True}
    small_run("llama", "K1", **settings)
    with pytest.raises(ConfigError, match="a random R"):
        small_run("llama", "K1", recompute_granularity="pass", **settings)


@pytest.mark.parametrize("preset", ["llama-410m", "pythia-1.4b", "gpt2-xl"])
def test_local_parameters_add_up(preset: str) -> None:
    """Over tensor and pipeline ranks, less what they hold several times: norms, some biases."""
    flags = ["--preset", preset, "--pipeline-model-parallel-size", "2", "--seq-length", "1024"]
    config = parse_args([*flags, "--global-batch-size", "2"], prog="test")
    run = PlannedRun.resolved(config, 2)
    result = plan_run(PlanOptions(world_size=2), run)
    total = sum(result["parameters"]["per_rank"])
    is_tied = not PRESETS[preset].get("untie_embeddings_and_output_weights", True)
    copies = result["parameters"]["embedding"] if is_tied else 0
    padding = 50304 - run.config.model.vocab_size
    assert (
        total == result["parameters"]["total"] + copies + 2 * padding * run.config.model.hidden_size
    )
