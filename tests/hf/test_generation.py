"""`generate`: batches, padding, strategies and caches give what each prompt gives by itself."""

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import QuantizedCache

from tests.hf.exports import METHODS, build, random_ids
from tests.hf.reference import LOGITS_ABSOLUTE, Sequential, largest_difference

ARCHITECTURES = ["llama", "gpt_neox", "gpt2"]
NEW = 6
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
SLOTS = {"ponderlm2", "interpolation", "pause"}
"""Methods with K+1 slots per token; the others have K+1 passes."""


@pytest.fixture(scope="module", params=METHODS)
def method(request):
    return request.param


@pytest.fixture(scope="module")
def model(method):
    return build("llama", **METHODS[method])


def padded(prompts, side, extra=0):
    """Prompts of unequal length as one batch: ids and mask."""
    length = max(p.size(1) for p in prompts) + extra
    rows, masks = [], []
    for p in prompts:
        padding = torch.zeros(1, length - p.size(1), dtype=torch.long)
        parts = (padding, p) if side == "left" else (p, padding)
        mask = (padding, torch.ones_like(p)) if side == "left" else (torch.ones_like(p), padding)
        rows.append(torch.cat(parts, dim=1))
        masks.append(torch.cat(mask, dim=1))
    return torch.cat(rows), torch.cat(masks)


PROMPTS = [random_ids(1, 5, seed=1), random_ids(1, 2, seed=2), random_ids(1, 7, seed=3)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_sequential_recomputation(architecture):
    model = build(architecture, num_latent_thoughts=2, num_jacobi_iterations=60)
    ids = random_ids(2, 5)
    expected = Sequential(model).greedy(ids, NEW)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), expected)


PADDED = [
    *((architecture, "right") for architecture in ARCHITECTURES),
    *(
        pytest.param(name, "left", marks=() if name in ("llama", "gpt2") else pytest.mark.slow)
        for name in ARCHITECTURES
    ),
]


@pytest.mark.parametrize(("architecture", "side"), PADDED)
def test_a_padded_batch_is_each_row_alone(architecture, side, method):
    model = build(architecture, **METHODS[method])
    ids, mask = padded(PROMPTS, side, extra=1)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask).logits
        for row, prompt in enumerate(PROMPTS):
            expected = model(prompt).logits[0]
            assert largest_difference(logits[row, mask[row] == 1], expected) <= LOGITS_ABSOLUTE
    found = model.generate(
        ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **GREEDY
    )
    assert torch.equal(found.sequences[:, : ids.size(1)], ids)
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(prompt, output_logits=True, return_dict_in_generate=True, **GREEDY)
        new = alone.sequences[0, prompt.size(1) :]
        assert torch.equal(found.sequences[row, ids.size(1) :], new)
        both = zip(found.logits, alone.logits, strict=True)
        assert all(largest_difference(f[row], a[0]) <= LOGITS_ABSOLUTE for f, a in both)


def test_right_padding_of_several_samples():
    model = build(**METHODS["ponderlm2"])
    ids, mask = padded(PROMPTS, "right")
    found = model.generate(
        input_ids=ids, attention_mask=mask, num_beams=2, num_return_sequences=2, **GREEDY
    )
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(prompt, num_beams=2, num_return_sequences=2, **GREEDY)
        assert torch.equal(found[2 * row : 2 * row + 2, : ids.size(1)], ids[row].expand(2, -1))
        new = alone[:, prompt.size(1) :]
        assert torch.equal(found[2 * row : 2 * row + 2, ids.size(1) :], new)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_embeddings_instead_of_ids(model, side):
    ids, mask = padded(PROMPTS, side, extra=1)
    embeddings = model.get_input_embeddings()(ids).detach()
    settings = {"attention_mask": mask, **GREEDY}
    found = model.generate(inputs_embeds=embeddings, **settings)
    both = model.generate(ids, inputs_embeds=embeddings, **settings)
    assert torch.equal(both[:, : ids.size(1)], ids) and torch.equal(both[:, -NEW:], found)
    for row, prompt in enumerate(PROMPTS):
        assert torch.equal(found[row, -NEW:], model.generate(prompt, **GREEDY)[0, prompt.size(1) :])


@pytest.mark.parametrize("kind", ["returned", "dynamic", "static"])
def test_a_conversation_padded_on_the_right(model, kind):
    """The cache has the columns of the text, padding included, in every turn."""
    kept = {
        "dynamic": lambda: {"past_key_values": DynamicCache()},
        "static": lambda: {"past_key_values": StaticCache(config=model.config, max_cache_len=40)},
    }
    cache = kept.get(kind, dict)()
    ids, mask = padded(PROMPTS, "right")
    first = model.generate(
        ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY, **cache
    )
    cache = {"past_key_values": first.past_key_values}
    assert cache["past_key_values"].get_seq_length() == first.sequences.size(1) - 1
    more, more_mask = padded([random_ids(1, n, seed=n) for n in (2, 4, 1)], "right")
    turn = torch.cat((first.sequences, more), dim=1)
    mask = torch.cat((mask, torch.ones(3, NEW, dtype=torch.long), more_mask), dim=1)
    found = model.generate(turn, attention_mask=mask, **cache, **GREEDY)
    for row in range(3):
        text = turn[row, mask[row] == 1][None]
        ones = torch.ones_like(text)  # the model may have written the padding token
        expected = model.generate(text, attention_mask=ones, **GREEDY)[0, text.size(1) :]
        assert torch.equal(found[row, turn.size(1) :], expected)


def test_prompts_without_an_end_are_refused():
    model = build(num_latent_thoughts=1, num_jacobi_iterations=2)
    ids, mask = padded(PROMPTS, "right")
    with pytest.raises(ValueError, match="row 1 has no new token"):
        model.generate(ids, attention_mask=mask * torch.tensor([[1], [0], [1]]), **GREEDY)
    if hasattr(GenerationConfig(), "prefill_chunk_size"):
        with pytest.raises(ValueError, match="prefill_chunk_size needs prompts padded on the left"):
            model.generate(ids, attention_mask=mask, prefill_chunk_size=3, **GREEDY)
    model.generation_config.pad_token_id = 0  # the mask follows from it
    found = model.generate(ids, **GREEDY)
    assert torch.equal(found, model.generate(ids, attention_mask=mask, **GREEDY))


def test_beam_search_and_sampling(model):
    ids, mask = padded(PROMPTS, "left")
    beams = {"num_beams": 3, "num_return_sequences": 2, "attention_mask": mask, **GREEDY}
    cached = model.generate(ids, **beams)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **beams))
    assert not torch.equal(cached[::2], cached[1::2])
    sampling = {"max_new_tokens": NEW, "do_sample": True, "temperature": 0.7, "top_k": 20}
    drawn = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        drawn.append(model.generate(ids, attention_mask=mask, use_cache=use_cache, **sampling))
    assert torch.equal(*drawn)


def test_static_cache(model):
    ids, mask = padded(PROMPTS, "left")
    for new in (3, 9, 4):  # transformers 4 keeps the cache for the next call
        settings = {"attention_mask": mask, "max_new_tokens": new, "do_sample": False}
        found = model.generate(ids, cache_implementation="static", **settings)
        assert torch.equal(found, model.generate(ids, **settings))
    beams = {"attention_mask": mask, "num_beams": 2, **GREEDY}
    found = model.generate(ids, cache_implementation="static", **beams)
    assert torch.equal(found, model.generate(ids, **beams))


def test_static_cache_is_full_when_its_tokens_are():
    """A capacity of tokens, whatever the slots of one are."""
    model = build(**METHODS["ponderlm2"])
    ids = random_ids(1, 8)
    cache = StaticCache(config=model.config, max_cache_len=8)
    with torch.no_grad():
        found = model(ids, past_key_values=cache, use_cache=True)
    assert largest_difference(found.logits, model(ids).logits) <= LOGITS_ABSOLUTE
    assert cache.get_seq_length() == cache.max_cache_len == 8
    assert cache.caches[0].layers[0].keys.size(2) == 24


@pytest.mark.skipif(
    not hasattr(GenerationConfig(), "prefill_chunk_size"), reason="not in this transformers"
)
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_prefill_in_chunks(model, implementation):
    ids, mask = padded(PROMPTS, "left")
    if transformers.__version__.startswith("4."):  # takes columns for positions: no padding
        ids, mask = ids[2:], mask[2:]
    settings = {"attention_mask": mask, "cache_implementation": implementation, **GREEDY}
    whole = model.generate(ids, **settings)
    for size in (3, 1):
        found = model.generate(
            ids, prefill_chunk_size=size, return_dict_in_generate=True, **settings
        )
        assert torch.equal(found.sequences, whole)


def test_drafts_are_taken_back(model):
    """Assisted decoding: a draft that is refused leaves the cache, with all its slots or passes."""
    ids = random_ids(1, 5).repeat(1, 3)[:, :12]
    mask = torch.ones_like(ids)
    # Lookup in older versions wants a token that ends; this one never comes.
    settings = {"attention_mask": mask, "eos_token_id": 96, **GREEDY}
    expected = model.generate(ids, **settings)
    for draft in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": build(method="vanilla")}):
        assert torch.equal(model.generate(ids, **draft, **settings), expected)


@pytest.mark.parametrize("kind", ["returned", "dynamic", "static", "copied"])
def test_conversation_on_a_kept_cache(model, kind):
    """The second turn sees the first one's tokens as they were kept."""
    prompt, more = random_ids(2, 5), random_ids(2, 4, seed=9)
    kept = {
        "dynamic": lambda: {"past_key_values": DynamicCache()},
        "static": lambda: {"past_key_values": StaticCache(config=model.config, max_cache_len=32)},
    }
    cache = kept.get(kind, dict)()
    first = model.generate(prompt, return_dict_in_generate=True, **GREEDY, **cache)
    if kind in ("returned", "copied"):
        cache = {"past_key_values": first.past_key_values}
    if kind == "copied":
        first.past_key_values.crop(-2)
        cache = copy.deepcopy(cache)
        first.past_key_values.reset()
        assert first.past_key_values.get_seq_length() == 0
    length = cache["past_key_values"].get_seq_length()
    assert length == first.sequences.size(1) - (3 if kind == "copied" else 1)
    turn = torch.cat((first.sequences, more), dim=1)
    mask = torch.ones_like(turn)
    found = model.generate(turn, attention_mask=mask, **cache, **GREEDY)
    assert torch.equal(found, model.generate(turn, attention_mask=mask, **GREEDY))
    assert cache["past_key_values"].get_seq_length() == found.size(1) - 1


def test_cache_counts_tokens_outside_and_slots_inside(model, method):
    found = model.generate(random_ids(2, 5), return_dict_in_generate=True, **GREEDY)
    cache = found.past_key_values
    stages, passes = (3, 1) if method in SLOTS else (1, 3)
    assert cache.get_seq_length() == 5 + NEW - 1
    assert len(cache.caches) == passes
    lengths = [int(layer.get_seq_length()) for layer in cache.layers]
    assert lengths == [stages * (5 + NEW - 1)] * (passes * 2)
    cache.crop(-4)
    assert cache.get_seq_length() == 5 + NEW - 1 - 4
    assert [int(c.get_seq_length()) for c in cache.caches] == [stages * (5 + NEW - 5)] * passes


def test_rounds_per_call_and_reported():
    model = build(num_latent_thoughts=2, num_jacobi_iterations=3)
    ids = random_ids(2, 9)
    settings = {"return_dict_in_generate": True, "output_logits": True, **GREEDY}
    cache = model.generate(ids, **settings).past_key_values
    assert cache.jacobi_iterations == [3]
    found = model.generate(ids, num_jacobi_iterations=7, **settings)
    assert found.past_key_values.jacobi_iterations == [7]
    with torch.no_grad():
        expected = model(ids, num_jacobi_iterations=7).logits[:, -1]
    assert largest_difference(found.logits[0], expected) <= LOGITS_ABSOLUTE
    found = model.generate(ids, num_jacobi_iterations=60, jacobi_tolerance=1e-3, **settings)
    (rounds,) = found.past_key_values.jacobi_iterations
    assert 3 < rounds < 2 * 9
    expected = Sequential(model).logits(ids)[:, -1]
    assert largest_difference(found.logits[0], expected) < 1e-3


def test_embeddings_instead_of_ids(model):
    ids = random_ids(2, 5)
    embeddings = model.get_input_embeddings()(ids).detach()
    with torch.no_grad():
        assert torch.equal(model(inputs_embeds=embeddings).logits, model(ids).logits)
    found = model.generate(inputs_embeds=embeddings, **GREEDY)
    assert torch.equal(found[:, -NEW:], model.generate(ids, **GREEDY)[:, 5:])


def test_last_logits_only(model):
    ids = random_ids(2, 5)
    with torch.no_grad():
        whole = model(ids).logits
        assert largest_difference(model(ids, logits_to_keep=2).logits, whole[:, -2:]) <= 1e-6
        picked = model(ids, logits_to_keep=torch.tensor([0, 3])).logits
    assert largest_difference(picked, whole[:, [0, 3]]) <= 1e-6


def test_what_a_cache_cannot_be():
    model = build(**METHODS["ponderlm2"])
    ids = random_ids(1, 4)
    filled = DynamicCache()
    filled.update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8), 0)
    with pytest.raises(ValueError, match="filled without this model's thoughts"):
        model(ids, past_key_values=filled)
    with pytest.raises(ValueError, match="QuantizedCache cannot hold"):
        model(ids, past_key_values=QuantizedCache.__new__(QuantizedCache))
    kept = model(ids, use_cache=True).past_key_values
    model.config.num_latent_thoughts = 1
    with pytest.raises(ValueError, match="other thoughts"):
        model(ids, past_key_values=kept)
    kept.reset()
    assert model(ids, past_key_values=kept, use_cache=True).past_key_values is kept
    with pytest.raises(ValueError, match=r"attention_mask: .*needed is \(1, 8\)"):
        model(ids, past_key_values=kept, attention_mask=torch.ones(1, 4))
