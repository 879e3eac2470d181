"""Initial weights: the stated distributions, and the same numbers whatever the layout."""

import math

import pytest
import torch

from megatron_ponder.model.build import build_model
from megatron_ponder.runtime import distributed
from tests.parity.layouts import config_of
from tests.parity.measure import gather_shards
from tests.ranks import run_ranks


def whole_weights(config):
    distributed.initialize(config.parallel, config.training.seed)
    model = build_model(config)
    weights = {n: gather_shards(p, p.detach()) for n, p in model.named_parameters()}
    return weights


def shape(**settings):
    return config_of("llama k1", {}, 1).replaced(
        hidden_size=256, ffn_hidden_size=512, kv_channels=64, **settings
    )


@pytest.mark.parametrize("model", ["llama k2", "gpt2 k2"])
def test_same_weights_on_every_layout(model):
    (alone,) = run_ranks(whole_weights, 1, config_of(model, {}, 1))
    tp2 = run_ranks(whole_weights, 2, config_of(model, {"tensor_model_parallel_size": 2}, 2))
    for weights in tp2:
        assert weights.keys() == alone.keys()
        assert all(torch.equal(weights[name], alone[name]) for name in alone)


@pytest.mark.parametrize("counts_thoughts", [False, True])
def test_small_initialisation(counts_thoughts):
    config = shape(num_latent_thoughts=3, small_init_depth_counts_thoughts=counts_thoughts)
    (weights,) = run_ranks(whole_weights, 1, config)
    std = math.sqrt(2 / (5 * 256))
    # A normal cut at 3 sigma has 0.9866 of its standard deviation.
    cut = 0.9866 * std
    for name in ("embedding.word_embeddings.weight", "decoder.layers.0.mlp.linear_fc1.weight"):
        assert float(weights[name].std()) == pytest.approx(cut, rel=0.02)
        assert float(weights[name].abs().max()) <= 3 * std
    depth = 2 * config.model.num_layers * (4 if counts_thoughts else 1)
    for name in ("self_attention.linear_proj", "mlp.linear_fc2"):
        projection = weights[f"decoder.layers.1.{name}.weight"]
        assert float(projection.std()) == pytest.approx(cut / math.sqrt(depth), rel=0.02)
    assert torch.equal(weights["final_norm.weight"], torch.ones(256))
    layers = [weights[f"decoder.layers.{i}.mlp.linear_fc1.weight"] for i in (0, 1)]
    assert not torch.equal(*layers)


def test_normal_initialisation_is_the_default_of_vanilla():
    (weights,) = run_ranks(whole_weights, 1, shape(method="vanilla", init_method_std=0.01))
    for name in ("embedding.word_embeddings.weight", "decoder.layers.1.mlp.linear_fc2.weight"):
        assert float(weights[name].std()) == pytest.approx(0.01, rel=0.02)
