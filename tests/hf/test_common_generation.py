"""What transformers promises of `generate`, asked of ours; test_generation.py has the rest."""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from tests.hf.exports import METHODS, build, random_ids
from tests.hf.reference import LOGITS_ABSOLUTE, largest_difference
from tests.hf.test_generation import GREEDY, NEW, PROMPTS, padded

IDS = random_ids(2, 5)
DETAILS = {"return_dict_in_generate": True, **GREEDY}


@pytest.fixture(scope="module")
def model():
    return build(**{**METHODS["ponderlm2"], "num_jacobi_iterations": 20})


@pytest.fixture(scope="module")
def greedy(model):
    return model.generate(IDS, output_scores=True, output_logits=True, **DETAILS)


def test_greedy_takes_the_most_likely(model, greedy):
    text = IDS
    for step in range(NEW):
        with torch.no_grad():
            logits = model(text, use_cache=False).logits[:, -1]
        assert largest_difference(greedy.logits[step], logits) <= LOGITS_ABSOLUTE
        text = torch.cat((text, logits.argmax(-1, keepdim=True)), dim=1)
    assert torch.equal(greedy.sequences, text)
    assert len(greedy.scores) == NEW and greedy.scores[0].shape == (2, 96)


@pytest.mark.parametrize("method", ["ponderlm2", "loop"])
def test_details_of_every_step(method):
    """Hidden states and attentions are those of the last pass: slots, not tokens."""
    model = build(**{**METHODS[method], "num_jacobi_iterations": 2})
    model.set_attn_implementation("eager")
    found = model.generate(IDS, output_hidden_states=True, output_attentions=True, **DETAILS)
    assert len(found.hidden_states) == len(found.attentions) == NEW
    slots = 3 if method == "ponderlm2" else 1
    for step, (hidden, attention) in enumerate(
        zip(found.hidden_states, found.attentions, strict=True)
    ):
        new, seen = (5 * slots, 0) if step == 0 else (1, (5 + step) * slots - 1)
        assert [h.shape for h in hidden] == [(2, new, 32)] * 3
        assert [a.shape for a in attention] == [(2, 4, new, seen + new)] * 2


def test_a_text_ends_at_any_of_several_tokens(model, greedy):
    new = greedy.sequences[:, 5:]
    ends = [int(new[0, 1]), int(new[1, 3])]
    found = model.generate(IDS, eos_token_id=ends, pad_token_id=0, **GREEDY)
    for row in range(2):
        length = next(i for i in range(NEW) if int(new[row, i]) in ends) + 1
        assert torch.equal(found[row, 5 : 5 + length], new[row, :length])
        assert not found[row, 5 + length :].any()
    shortest = model.generate(IDS, eos_token_id=ends, min_new_tokens=NEW, **GREEDY)
    assert shortest.shape == (2, 5 + NEW)
    assert not torch.isin(shortest[:, 5:], torch.tensor(ends)).any()


def test_lengths(model, greedy):
    assert torch.equal(model.generate(IDS, max_length=8, do_sample=False), greedy.sequences[:, :8])
    config = GenerationConfig(max_new_tokens=2, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(IDS, generation_config=config), greedy.sequences[:, :7])


class AfterThree(StoppingCriteria):
    """Stops rows once they have three new tokens."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.size(0),), input_ids.size(1) >= 8)


class Only(LogitsProcessor):
    """Allows one token."""

    def __call__(self, input_ids, scores):
        return torch.full_like(scores, float("-inf")).index_fill_(1, torch.tensor([17]), 0.0)


def test_stopping_criteria_and_processors(model, greedy):
    found = model.generate(IDS, stopping_criteria=[AfterThree()], **GREEDY)
    assert torch.equal(found, greedy.sequences[:, :8])
    assert (model.generate(IDS, logits_processor=[Only()], **GREEDY)[:, 5:] == 17).all()


def test_settings_that_change_probabilities(model, greedy):
    first = greedy.sequences[:, 5].tolist()
    barred = model.generate(IDS, bad_words_ids=[[token] for token in first], **GREEDY)
    assert not torch.isin(barred[:, 5:], torch.tensor(first)).any()
    for settings in ({"no_repeat_ngram_size": 1}, {"repetition_penalty": 1e6}):
        for row in model.generate(IDS, **settings, **GREEDY):
            assert len({*row[5:].tolist()}) == NEW


def test_streaming(model, greedy):
    class Collected(BaseStreamer):
        def __init__(self):
            self.parts, self.has_ended = [], False

        def put(self, value):
            self.parts.append(value.flatten())

        def end(self):
            self.has_ended = True

    streamer = Collected()
    model.generate(IDS[:1], streamer=streamer, **GREEDY)
    assert torch.equal(torch.cat(streamer.parts), greedy.sequences[0]) and streamer.has_ended


def test_probabilities_of_a_beam(model):
    found = model.generate(
        IDS, num_beams=3, num_return_sequences=3, output_scores=True, length_penalty=1.0, **DETAILS
    )
    scores = found.sequences_scores.view(2, 3)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    transitions = model.compute_transition_scores(
        found.sequences, found.scores, found.beam_indices, normalize_logits=False
    )
    with torch.no_grad():
        log_probabilities = model(found.sequences).logits.log_softmax(-1)
    expected = log_probabilities[:, 4:-1].gather(2, found.sequences[:, 5:, None])[..., 0]
    assert largest_difference(transitions, expected) <= 1e-4
    assert largest_difference(found.sequences_scores, expected.sum(1) / NEW) <= 1e-4


def test_samples_repeat_with_the_seed(model):
    settings = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 4}
    drawn = []
    for num_beams in (1, 1, 4):
        torch.manual_seed(2)
        drawn.append(model.generate(IDS, num_beams=num_beams, **settings))
    assert drawn[0].shape == (6, 9) and torch.equal(drawn[0], drawn[1])
    assert drawn[2].shape == (6, 9) and torch.equal(drawn[2][::3, :5], IDS)
    assert len({tuple(row.tolist()) for row in drawn[0]}) > 2
    with pytest.raises(ValueError, match="num_return_sequences"):
        model.generate(IDS, num_return_sequences=2, **GREEDY)


def test_guidance_is_the_same_with_and_without_a_cache(model):
    found = [
        model.generate(IDS[:1], guidance_scale=1.5, use_cache=cache, **GREEDY)
        for cache in (True, False)
    ]
    assert torch.equal(*found)


@pytest.mark.parametrize("method", ["ponderlm2", "ponderlm"])
def test_rows_of_a_cache_are_chosen_and_repeated(method):
    model = build(**{**METHODS[method], "num_jacobi_iterations": 3})
    new = random_ids(4, 1, seed=6)
    with torch.no_grad():
        for change, rows in (
            (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), [1, 0]),
            (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
            (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        ):
            cache = model(IDS, use_cache=True).past_key_values
            change(cache)
            found = model(new[: len(rows)], past_key_values=cache).logits
            cache = model(IDS[rows], use_cache=True).past_key_values
            expected = model(new[: len(rows)], past_key_values=cache).logits
            assert largest_difference(found, expected) <= LOGITS_ABSOLUTE


def test_nothing_is_left_behind(model, greedy):
    before = model.generation_config.to_dict(), model.config.to_dict()
    model.generate(IDS, num_jacobi_iterations=1, num_beams=2, **GREEDY)
    assert (model.generation_config.to_dict(), model.config.to_dict()) == before
    assert torch.equal(model.generate(IDS, **GREEDY), greedy.sequences)


def test_assisted_sampling_and_an_assistant_with_thoughts(model, greedy):
    assistant = build(num_latent_thoughts=1, num_jacobi_iterations=1)
    found = model.generate(IDS[:1], assistant_model=assistant, **GREEDY)
    assert torch.equal(found, greedy.sequences[:1])
    torch.manual_seed(1)
    drawn = model.generate(IDS[:1], assistant_model=assistant, do_sample=True, max_new_tokens=NEW)
    assert drawn.shape == (1, 5 + NEW)


def test_settings_of_generate_that_are_misspelt(model):
    with pytest.raises(ValueError, match="num_jacobi_iteration"):
        model.generate(IDS, num_jacobi_iteration=4, **GREEDY)


@pytest.mark.parametrize("settings", [{"penalty_alpha": 0.6, "top_k": 4}, {"dola_layers": "low"}])
def test_strategies_that_read_hidden_states_are_refused(model, settings):
    """Theirs are one per token; and their code would come from the Hub."""
    with pytest.raises(ValueError, match="reads one hidden state for each token"):
        model.generate(IDS, max_new_tokens=2, **settings)
    config = GenerationConfig(max_new_tokens=2, **settings)
    with pytest.raises(ValueError, match="reads one hidden state for each token"):
        model.generate(IDS, config)


def test_continuous_batching_is_refused(model):
    if not hasattr(model, "generate_batch"):
        pytest.skip("not in this transformers")
    with pytest.raises(ValueError, match="Continuous batching packs sequences"):
        model.generate_batch([[1, 2], [3]], generation_config=GenerationConfig(max_new_tokens=2))


def test_beams_of_prompts_padded_on_both_sides(model):
    ids, mask = padded(PROMPTS, "right", extra=1)
    ids = torch.cat((torch.zeros(3, 2, dtype=torch.long), ids), dim=1)
    mask = torch.cat((torch.zeros(3, 2, dtype=torch.long), mask), dim=1)
    settings = {"num_beams": 2, "max_new_tokens": 4}
    found = model.generate(ids, attention_mask=mask, do_sample=False, **settings)
    for row, prompt in enumerate(PROMPTS):
        alone = model.generate(prompt, do_sample=False, **settings)
        assert torch.equal(found[row, -4:], alone[0, -4:])
