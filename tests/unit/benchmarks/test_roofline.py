"""Pieces of a pass: their FLOPs are those counted elsewhere; floors are least times."""

import time

import pytest

from benchmarks.roofline import pass_operations
from benchmarks.timing import DeviceRates, time_s
from megatron_ponder.config.parse import parse_args
from megatron_ponder.config.resolve import resolve
from megatron_ponder.model.size import forward_flops
from megatron_ponder.ponder.method import load_method
from megatron_ponder.ponder.training_plan import training_plan

SMALL = (
    "--num-layers 3 --hidden-size 32 --num-attention-heads 4 --vocab-size 100 --seq-length 12 "
    "--micro-batch-size 2"
).split()
CASES = {
    "llama k2": "--num-latent-thoughts 2 --num-query-groups 2",
    "parallel residual": "--preset pythia-14m --num-latent-thoughts 1",
    "learned positions": "--preset gpt2 --num-latent-thoughts 1",
    "mixtures": "--method ponderlm --num-latent-thoughts 2",
    "vanilla": "--method vanilla",
}


def operations(arguments):
    config = resolve(parse_args([*arguments.split(), *SMALL], prog="test"), world_size=1)
    plan = training_plan(load_method(config.method), 2)
    return (
        config,
        plan,
        [pass_operations(config.model, plan, p, tokens=24, seq_length=12) for p in plan.passes],
    )


@pytest.mark.parametrize("case", CASES)
def test_flops_are_those_of_the_flop_counter(case):
    config, plan, passes = operations(CASES[case])
    counted = forward_flops(config.model, plan, 12).passes
    assert [sum(o.flops for o in pieces) for pieces in passes] == [2 * c.total for c in counted]


def test_traffic_of_a_matmul():
    config, _, passes = operations(CASES["vanilla"])
    (head,) = (o for o in passes[0] if o.name == "head")
    assert head.values == 24 * 32 + 32 * 100 + 24 * 100
    assert sum(o.name == "rotary" for o in passes[0]) == config.model.num_layers


def test_floor_is_the_longer_of_arithmetic_and_traffic():
    rates = DeviceRates(gemm_tflops=2.0, copy_gb_per_s=100.0)
    assert rates.floor_s(4e12, 1e9) == 2.0
    assert rates.floor_s(1e9, 3e11) == 3.0


def test_time_is_of_one_call():
    calls = []

    def sleep():
        calls.append(time.sleep(0.002))

    # Two measurements: on a busy machine the best of one can exceed the other's median a little.
    assert 0.002 <= time_s(sleep, is_best=True) <= 1.5 * time_s(sleep) < 0.03
    assert len(calls) < 1000
