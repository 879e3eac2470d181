"""What transformers promises of any causal language model, asked of ours: forward, weights, files.

The behaviours are those that its own common tests hold stock models to; what other modules here
show already is not repeated. Where ours cannot do something, the message is the behaviour.
"""

import copy
import inspect
import io
import json
import pickle

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests.hf.exports import METHODS, WEIGHTS, build, export_case, random_ids
from tests.hf.reference import LOGITS_ABSOLUTE, largest_difference

FEW = {name: {**METHODS[name], "num_jacobi_iterations": 2} for name in METHODS}
IDS = random_ids(3, 7)


@pytest.fixture(scope="module")
def model():
    """Shared: not to be changed."""
    return build(**FEW["ponderlm2"])


@pytest.fixture(scope="module")
def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture
def own():
    """A model to change."""
    return build(**FEW["ponderlm2"])


# Forward


def test_signature(model):
    names = list(inspect.signature(model.forward).parameters)
    assert names[:2] == ["input_ids", "attention_mask"] and model.main_input_name == "input_ids"
    assert {"labels", "inputs_embeds", "position_ids", "use_cache", "logits_to_keep"} <= {*names}


def test_a_forward_is_repeatable(own, logits):
    assert torch.equal(own(IDS).logits, logits)
    assert torch.equal(own.train()(IDS).logits, logits), "there is no dropout"


def test_rows_of_a_batch_are_independent(model, logits):
    found = model(IDS.flip(0)).logits.flip(0)
    assert largest_difference(found, logits) <= LOGITS_ABSOLUTE
    assert largest_difference(model(IDS[1:2]).logits, logits[1:2]) <= LOGITS_ABSOLUTE


@pytest.mark.parametrize("method", METHODS)
def test_later_tokens_change_nothing_before_them(method):
    model = build(**FEW[method])
    other = torch.cat((IDS[:, :4], random_ids(3, 3, seed=8)), dim=1)
    with torch.no_grad():
        found, expected = model(other).logits, model(IDS).logits
    assert largest_difference(found[:, :4], expected[:, :4]) <= LOGITS_ABSOLUTE
    assert largest_difference(found[:, 4:], expected[:, 4:]) > 0.01


def test_outputs_by_name_and_as_a_tuple(model):
    named = model(IDS, labels=IDS, output_hidden_states=True)
    plain = model(IDS, labels=IDS, output_hidden_states=True, return_dict=False)
    assert list(named.keys()) == ["loss", "logits", "hidden_states"]
    assert torch.equal(plain[0], named[0]) and torch.equal(plain[1], named["logits"])
    assert all(torch.equal(a, b) for a, b in zip(plain[2], named.hidden_states, strict=True))


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.bool, torch.float32])
def test_a_mask_of_any_dtype(model, logits, dtype):
    mask = torch.ones_like(IDS)
    assert torch.equal(model(IDS, attention_mask=mask.to(dtype)).logits, logits)
    mask[0, :2] = 0
    expected = model(IDS[:1, 2:]).logits
    found = model(IDS, attention_mask=mask.to(dtype)).logits[:1, 2:]
    assert largest_difference(found, expected) <= LOGITS_ABSOLUTE


@pytest.mark.parametrize("shape", [(3, 1, 7, 7), (7,), (3, 6), (3, 8), (2, 7)])
def test_masks_that_are_refused(model, shape):
    with pytest.raises(ValueError, match=r"attention_mask: .*needed is \(3, 7\)"):
        model(IDS, attention_mask=torch.ones(shape))


@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_in_padding_is_not_seen(model, side):
    mask = torch.ones_like(IDS)
    mask[:, slice(0, 3) if side == "left" else slice(4, 7)] = 0
    other = torch.where(mask == 0, random_ids(3, 7, seed=5), IDS)
    found, expected = (model(ids, attention_mask=mask).logits for ids in (other, IDS))
    assert torch.equal(found[mask == 1], expected[mask == 1])


def test_positions_given_and_derived(model, logits):
    positions = torch.arange(7)[None]
    assert torch.equal(model(IDS, position_ids=positions).logits, logits)
    shifted = model(IDS, position_ids=positions + 5).logits
    assert largest_difference(shifted, logits) <= 10 * LOGITS_ABSOLUTE, "rotary: relative"
    gapped = model(IDS, position_ids=2 * positions).logits
    assert largest_difference(gapped, logits) > 0.01


def test_contradictions_and_unknown_arguments(model):
    embeddings = model.get_input_embeddings()(IDS)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(IDS, inputs_embeds=embeddings)
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(TypeError, match="no argument head_mask, num_jacobi_iteration"):
        model(IDS, num_jacobi_iteration=9, head_mask=torch.ones(2))
    assert model(IDS, head_mask=None, token_type_ids=torch.zeros_like(IDS)) is not None


# Loss


def test_the_loss_is_cross_entropy_of_the_next_token(model, logits):
    labels = IDS.clone()
    labels[0, :4] = -100
    losses = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    num_tokens = int((labels[:, 1:] != -100).sum())
    found = model(IDS, labels=labels)
    assert found.past_key_values is None
    assert float(found.loss.detach()) == pytest.approx(float(losses) / num_tokens, abs=1e-5)
    found = model(IDS, labels=labels, num_items_in_batch=100).loss
    assert float(found.detach()) == pytest.approx(float(losses) / 100, abs=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_weight_has_a_gradient(method):
    model = build(**FEW[method]).train()
    model(IDS, labels=IDS).loss.backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None and weight.grad.isfinite().all(), name
        assert float(weight.grad.abs().max()) > 0, name


def test_gradients_of_hidden_states_and_inputs(own):
    embeddings = own.get_input_embeddings()(IDS).detach().requires_grad_()
    output = own(inputs_embeds=embeddings, output_hidden_states=True)
    output.hidden_states[0].retain_grad()
    output.logits.sum().backward()
    assert float(embeddings.grad.abs().max()) > 0
    assert output.hidden_states[0].grad is not None


def test_a_frozen_model_with_checkpointing(own):
    """What adapters do: inputs require gradients though no weight does."""
    own.requires_grad_(False)
    own.enable_input_require_grads()
    own.train().gradient_checkpointing_enable()
    own.lm_head.weight.requires_grad_(True)
    own(IDS, labels=IDS).loss.backward()
    assert float(own.lm_head.weight.grad.abs().max()) > 0


# Weights and embeddings


@pytest.mark.parametrize("architecture", WEIGHTS)
def test_weights_are_those_of_the_stock_class(architecture):
    model = build(architecture, **FEW["ponderlm2"])
    stock = getattr(transformers, type(model).__name__.replace("Ponder", ""), None)
    stock = stock or transformers.GPT2LMHeadModel
    plain = stock(model.config)
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert plain.num_parameters() == model.num_parameters()
    tied = model.config.tie_word_embeddings
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shared == tied


@pytest.mark.parametrize("architecture", WEIGHTS)
def test_resized_embeddings(architecture, tmp_path):
    model = build(architecture, **FEW["ponderlm2"])
    ids = IDS % 80
    before = model(ids).logits
    for size in (104, 80):
        model.resize_token_embeddings(size, mean_resizing=False)
        assert model.config.vocab_size == size
        assert model.get_output_embeddings().weight.shape == (size, 32)
        after = model(ids, labels=ids)
        assert after.logits.shape == (3, 7, size) and after.loss.isfinite()
        kept = min(size, 96)
        assert largest_difference(after.logits[..., :kept], before[..., :kept]) <= LOGITS_ABSOLUTE
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, after.logits)


def test_the_row_of_the_pause_token_stays():
    model = build(**FEW["pause"])
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(80\) would remove row 95"):
        model.resize_token_embeddings(80)
    assert model(IDS).logits.shape == (3, 7, 96)
    before = model(IDS).logits
    model.resize_token_embeddings(97, mean_resizing=False)
    assert largest_difference(model(IDS).logits[..., :96], before) <= LOGITS_ABSOLUTE


def test_replaced_embeddings(own, logits):
    table = nn.Embedding(96, 32)
    own.set_input_embeddings(table)
    assert own.get_input_embeddings() is table
    assert largest_difference(own(IDS).logits, logits) > 0.01
    head = nn.Linear(32, 50, bias=False)
    own.set_output_embeddings(head)
    assert own(IDS).logits.shape == (3, 7, 50)


def test_new_weights_follow_the_configuration():
    config = build(**FEW["ponderlm2"]).config
    torch.manual_seed(1)
    model = type(build(**FEW["ponderlm2"]))(config)
    weight = model.base_model.layers[0].mlp.up_proj.weight
    assert float(weight.detach().std()) == pytest.approx(config.initializer_range, rel=0.1)
    assert all(w.isfinite().all() for w in model.parameters())


# Copies, files and dtypes


def test_copies(own, logits):
    with torch.no_grad():
        copied = copy.deepcopy(own)
        pickled = pickle.loads(pickle.dumps(own))
        stream = io.BytesIO()
        torch.save(own, stream)
        stream.seek(0)
        saved = torch.load(stream, weights_only=False)
        for other in (copied, pickled, saved):
            assert torch.equal(other(IDS).logits, logits)
            other.lm_head.weight.zero_()
    assert float(own.lm_head.weight.detach().abs().max()) > 0


@torch.no_grad()
def test_outputs_can_be_copied(model):
    output = model(IDS[:, :5], use_cache=True)
    expected = model(IDS[:, 5:], past_key_values=copy.deepcopy(output.past_key_values)).logits
    for copied in (copy.deepcopy(output), pickle.loads(pickle.dumps(output))):
        cache = copied.past_key_values
        assert cache.get_seq_length() == 5
        assert torch.equal(model(IDS[:, 5:], past_key_values=cache).logits, expected)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export_case("llama_ponderlm2_k2_j2", tmp_path_factory.mktemp("common") / "export")


def load(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings)


def test_files_in_parts(exported, tmp_path):
    model = load(exported)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(load(tmp_path)(IDS).logits, model(IDS).logits)


def test_a_missing_weight_is_reported(exported, tmp_path):
    model = load(exported)
    state = model.state_dict()
    del state["model.norm.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    _, found = load(tmp_path, output_loading_info=True)
    assert list(found["missing_keys"]) == ["model.norm.weight"]


def test_a_model_from_a_configuration_alone(exported):
    config = AutoConfig.from_pretrained(exported, trust_remote_code=True)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert type(model).__name__ == "PonderLlamaForCausalLM"
    assert model(IDS).logits.isfinite().all()
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert {p.device.type for p in empty.parameters()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_at_loading(exported, dtype, tmp_path):
    model = load(exported, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    expected = load(exported, dtype=torch.float32)(IDS).logits
    found = model(IDS).logits
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float64 else 0.05 * float(expected.detach().abs().max())
    assert largest_difference(found, expected) <= tolerance
    model.save_pretrained(tmp_path)
    assert str(dtype).removeprefix("torch.") in (tmp_path / "config.json").read_text()


def test_attention_at_loading(exported):
    eager = load(exported, attn_implementation="eager")
    output = eager(IDS, output_attentions=True)
    assert len(output.attentions) == 2
    assert largest_difference(output.logits, load(exported)(IDS).logits) <= LOGITS_ABSOLUTE


def test_the_configuration_survives_every_way_of_writing_it(model, tmp_path):
    config = model.config
    same = [type(config).from_dict(config.to_dict()), copy.deepcopy(config)]
    config.save_pretrained(tmp_path)
    same.append(type(config).from_pretrained(tmp_path))
    for other in same:
        assert {**other.to_dict(), "_name_or_path": ""} == {**config.to_dict(), "_name_or_path": ""}
    assert json.loads(config.to_json_string())["model_type"] == "ponder_llama"
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        assert isinstance(getattr(config, name), int)


# Whole-model transformations


@pytest.mark.parametrize(
    "method",
    ["ponderlm2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("loop", "pause"))],
)
def test_torch_export(method):
    small = {"num_latent_thoughts": 1, "num_jacobi_iterations": 1}
    model = build(**{**FEW[method], **small})
    program = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False)
    other = random_ids(3, 7, seed=4)
    found = program.module()(other, use_cache=False).logits
    assert largest_difference(found, model(other).logits) <= LOGITS_ABSOLUTE


@pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="its masks cannot be traced, for any model"
)
@pytest.mark.filterwarnings("ignore")
def test_tracing(own):
    own.config.return_dict, own.config.use_cache = False, False
    own.config.num_latent_thoughts = 1
    traced = torch.jit.trace(own, (IDS,))
    other = random_ids(3, 7, seed=4)
    assert largest_difference(traced(other)[0], own(other)[0]) <= LOGITS_ABSOLUTE


def test_outputs_hold_tensors_for_who_gathers_them(model):
    """DataParallel splits and joins outputs; numbers among them would stop it."""
    output = model(IDS, labels=IDS)
    assert all(isinstance(value, torch.Tensor) for value in output.values())
    assert output.jacobi_iterations == 2
    assert torch.equal(nn.DataParallel(model)(IDS).logits, model(IDS).logits)
