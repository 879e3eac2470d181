"""Cached decoding, the forward and slot-by-slot recomputation are the same function of the tokens.

At R >= K * (tokens - 1) exactly, at a smaller R up to what the Jacobi rounds have left to do.
"""

import pytest
import torch

from tests.hf.exports import METHODS, build, random_ids
from tests.hf.reference import LOGITS_ABSOLUTE, Sequential, largest_difference

ARCHITECTURES = ["llama", "gpt_neox", "gpt2"]
LENGTH, PROMPT = 9, 5


def decode(model, ids, prompt_length, **settings):
    """Logits of every token from the prompt's last on: prefill, then token after token."""
    output = model(ids[:, :prompt_length], use_cache=True, **settings)
    found = [output.logits[:, -1:]]
    for t in range(prompt_length, ids.size(1)):
        output = model(ids[:, t : t + 1], past_key_values=output.past_key_values, use_cache=True)
        found.append(output.logits)
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_cached_uncached_and_sequential(architecture, k):
    model = build(architecture, num_latent_thoughts=k, num_jacobi_iterations=k * (LENGTH - 1))
    ids = random_ids(2, LENGTH)
    expected = Sequential(model).logits(ids)
    uncached = model(ids, use_cache=False).logits
    cached = decode(model, ids, PROMPT)
    assert largest_difference(uncached, expected) <= LOGITS_ABSOLUTE
    assert largest_difference(cached, expected[:, PROMPT - 1 :]) <= LOGITS_ABSOLUTE

    at_3 = model(ids, num_jacobi_iterations=3, use_cache=False).logits
    residual = largest_difference(at_3, expected)
    assert residual > 10 * LOGITS_ABSOLUTE, "nothing is left to see at R = 3"
    cached_at_3 = decode(model, ids, PROMPT, num_jacobi_iterations=3)
    assert largest_difference(cached_at_3, expected[:, PROMPT - 1 :]) <= residual
    assert largest_difference(cached_at_3, at_3[:, PROMPT - 1 :]) <= 2 * residual


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_other_architectures(architecture):
    model = build(architecture, num_latent_thoughts=1, num_jacobi_iterations=LENGTH - 1)
    ids = random_ids(2, LENGTH)
    expected = Sequential(model).logits(ids)
    assert largest_difference(model(ids).logits, expected) <= LOGITS_ABSOLUTE
    cached = decode(model, ids, PROMPT)
    assert largest_difference(cached, expected[:, PROMPT - 1 :]) <= LOGITS_ABSOLUTE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@torch.no_grad()
def test_a_cache_changes_nothing(architecture, method):
    model = build(architecture, **METHODS[method])
    ids = random_ids(2, LENGTH)
    whole = model(ids, use_cache=False).logits
    assert largest_difference(decode(model, ids, PROMPT), whole[:, PROMPT - 1 :]) <= LOGITS_ABSOLUTE
    # The prompt in parts, one of them a single token.
    first = model(ids[:, :3], use_cache=True)
    second = model(ids[:, 3:4], past_key_values=first.past_key_values, use_cache=True)
    third = model(ids[:, 4:], past_key_values=second.past_key_values, use_cache=True)
    parts = torch.cat((first.logits, second.logits, third.logits), dim=1)
    assert largest_difference(parts, whole) <= LOGITS_ABSOLUTE


@torch.no_grad()
def test_what_is_seen_can_be_used_without_being_added_to():
    model = build(**METHODS["ponderlm2"])
    ids = random_ids(2, LENGTH)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    for _ in range(2):
        rest = model(ids[:, 4:], past_key_values=cache, use_cache=False)
        assert rest.past_key_values is None
        assert largest_difference(rest.logits, model(ids).logits[:, 4:]) <= LOGITS_ABSOLUTE
        assert cache.get_seq_length() == 4


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_no_thoughts(method):
    """K = 0 is one pass over scaled embeddings."""
    model = build(**{**METHODS[method], "num_latent_thoughts": 0})
    ids = random_ids(2, LENGTH)
    scale = model.config.embedding_scale or 1.0
    stock = Sequential(model)
    hidden = stock.base(inputs_embeds=stock.table(ids) * scale).last_hidden_state
    assert largest_difference(model(ids).logits, stock.head(hidden)) <= LOGITS_ABSOLUTE
    expected = stock.head(hidden)[:, PROMPT - 1 :]
    assert largest_difference(decode(model, ids, PROMPT), expected) <= LOGITS_ABSOLUTE


@torch.no_grad()
def test_number_of_rounds():
    model = build(num_latent_thoughts=2, num_jacobi_iterations=3)
    ids = random_ids(2, LENGTH)
    assert model(ids).jacobi_iterations == 3
    at_5 = model(ids, num_jacobi_iterations=5)
    assert at_5.jacobi_iterations == 5
    model.config.num_jacobi_iterations = 5
    assert torch.equal(model(ids).logits, at_5.logits)
    with pytest.raises(ValueError, match="num_jacobi_iterations = -1"):
        model(ids, num_jacobi_iterations=-1)


@torch.no_grad()
def test_tolerance_ends_the_rounds():
    model = build(num_latent_thoughts=2, num_jacobi_iterations=3)
    ids = random_ids(2, LENGTH)
    thoughts = [
        model(ids, num_jacobi_iterations=r, output_hidden_states=True).hidden_states[0]
        for r in range(12)
    ]

    def change(r):
        new, old = (t.unflatten(1, (-1, 3))[:, :, 1:] for t in (thoughts[r], thoughts[r - 1]))
        return float(((new - old).norm(dim=-1) / new.norm(dim=-1)).max())

    tolerance = 1.5 * change(4)
    assert change(3) > tolerance > change(4)
    found = model(ids, num_jacobi_iterations=50, jacobi_tolerance=tolerance)
    assert found.jacobi_iterations == 4
    assert torch.equal(found.logits, model(ids, num_jacobi_iterations=4).logits)
    assert model(ids, num_jacobi_iterations=2, jacobi_tolerance=0.0).jacobi_iterations == 2
    # Padding has no thoughts that anybody waits for.
    padded = torch.cat((torch.zeros(2, 3, dtype=torch.long), ids), dim=1)
    mask = (padded != 0).long()
    found = model(padded, attention_mask=mask, num_jacobi_iterations=50, jacobi_tolerance=tolerance)
    assert found.jacobi_iterations == 4


def test_random_rounds_in_training_only():
    settings = {"min_jacobi_iterations": 1, "max_jacobi_iterations": 4}
    model = build(random_jacobi_iterations=True, **settings)
    runs = []
    model.base_model.layers[0].register_forward_hook(lambda *_: runs.append(None))
    ids = random_ids(1, 4)
    model.train()
    torch.manual_seed(0)
    drawn = set()
    for _ in range(40):
        runs.clear()
        model(ids, labels=ids)
        drawn.add(len(runs) - 2)
    assert drawn == {1, 2, 3, 4}
    runs.clear()
    model(ids, labels=ids, num_jacobi_iterations=7)
    assert len(runs) == 9
    assert model.eval()(ids).jacobi_iterations == model.config.num_jacobi_iterations
