"""The reference on stock layers is the plain one, loss for loss, from the same weights."""

import pytest
import torch

from benchmarks.stock_reference import StockReference, build_stock_reference
from megatron_ponder.config.parse import parse_args
from megatron_ponder.config.resolve import resolve
from megatron_ponder.errors import ConfigError
from tests.reference.models import build_reference, loss_function

SMALL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --vocab-size 101 --seq-length 9"
).split()
CASES = {
    "llama, grouped, k2 r1": "--num-query-groups 2 --num-latent-thoughts 2",
    "neox k1": "--preset pythia-14m",
    "gpt2 k1": "--preset gpt2",
    "vanilla": "--method vanilla",
    "neox vanilla": "--preset pythia-14m --method vanilla",
    "gpt2 loop": "--preset gpt2 --method loop --num-latent-thoughts 2",
    "pause": "--method pause --num-latent-thoughts 2",
    "ponderlm, top 7": "--method ponderlm --interpolation-use-topk --interpolation-topk 7",
}


def run_config(arguments):
    return resolve(parse_args([*arguments.split(), *SMALL], prog="test"), world_size=1)


def losses(arguments, rounds=1):
    config = run_config(arguments)
    stock, plain = build_stock_reference(config), build_reference(config)
    weights = stock.stock_weights(config.model)
    with torch.no_grad():
        for weight in weights.values():
            weight.normal_(mean=float(weight.dim() == 1), std=0.1)
    plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
    ids = torch.randint(
        config.model.vocab_size, (2, 10), generator=torch.Generator().manual_seed(1)
    )
    tokens, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    return stock(tokens, labels, rounds), loss_function(plain(tokens, 1), labels)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_plain_model(case):
    actual, expected = losses(CASES[case])
    assert torch.isfinite(expected)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_one_round_more_is_caught():
    actual, expected = losses(CASES["llama, grouped, k2 r1"], rounds=2)
    assert abs(actual - expected) > 1e-4


def test_what_it_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="--jacobi-grad-passes 1: the reference has None only"):
        StockReference(run_config("--jacobi-grad-passes 1"))
    with pytest.raises(ConfigError, match="--method tests.methods.echo"):
        StockReference(run_config("--method tests.methods.echo"))
