"""What comes from transformers, torch and their neighbours works around the passes."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.hf.exports import METHODS, WEIGHTS, build, export_case, random_ids
from tests.hf.reference import LOGITS_ABSOLUTE, largest_difference
from tests.hf.test_generation import GREEDY, PROMPTS, padded

LIKE_FLASH = "packs_by_position"
"""Must not have flash in it: transformers would look for a kernel of that name."""
FEW_ROUNDS = {name: {**METHODS[name], "num_jacobi_iterations": 2} for name in METHODS}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def like_flash_attention(module, query, key, value, attention_mask, **kwargs):
    """What transformers' flash attention computes, of [b, heads, slots, d].

    Several sequences in one row if the positions of a batch of one are not consecutive; else
    causal, the last query at the last key; padding from a mask [b, slots].
    """
    positions = kwargs.get("position_ids")
    scaling = kwargs.get("scaling", query.size(-1) ** -0.5)
    num_queries, num_keys = query.size(2), key.size(2)
    is_seen = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
    is_seen = is_seen.expand(query.size(0), 1, -1, -1)
    if attention_mask is not None:
        is_seen = is_seen & attention_mask[:, None, None, :]
    elif query.size(0) == 1 and positions is not None and num_queries > 1:
        starts = positions[0].diff(prepend=positions[0, :1] - 1) != 1
        sequence = starts.cumsum(0)
        if bool(starts[1:].any()):
            is_seen = is_seen & (sequence[:, None] == sequence[None, :])
    groups = query.size(1) // key.size(1)
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = (query @ key.mT * scaling).masked_fill(~is_seen, -1e30)
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@pytest.fixture
def flash_like():
    """Registered for a test."""
    ALL_ATTENTION_FUNCTIONS.register(LIKE_FLASH, like_flash_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(LIKE_FLASH, flash_attention_mask)
    yield LIKE_FLASH
    del ALL_ATTENTION_FUNCTIONS._global_mapping[LIKE_FLASH]
    del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[LIKE_FLASH]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", WEIGHTS)
@torch.no_grad()
def test_attention_implementations(architecture, method, flash_like):
    model = build(architecture, **FEW_ROUNDS[method])
    ids, mask = padded(PROMPTS, "left", extra=1)
    found = {}
    for name in ("sdpa", "eager", flash_like):
        model.set_attn_implementation(name)
        alone = model(PROMPTS[0], use_cache=True)
        after = model(PROMPTS[1], past_key_values=alone.past_key_values, use_cache=True)
        batch = model(ids, attention_mask=mask).logits[mask == 1]
        found[name] = torch.cat((alone.logits[0], after.logits[0], batch))
        found[f"{name} generates"] = model.generate(PROMPTS[0], **GREEDY)
    for name in ("eager", flash_like):
        assert largest_difference(found[name], found["sdpa"]) <= LOGITS_ABSOLUTE
        assert torch.equal(found[f"{name} generates"], found["sdpa generates"])


def test_positions_would_mislead_flash_attention(flash_like):
    """The twin of flash attention notices what the hooks on attention modules prevent."""
    model = build(**FEW_ROUNDS["pause"])
    expected = model(PROMPTS[0]).logits
    model.set_attn_implementation(flash_like)
    for module in model.modules():
        if type(module).__name__ == "LlamaAttention":
            module._forward_pre_hooks.clear()
    assert largest_difference(model(PROMPTS[0]).logits, expected) > 100 * LOGITS_ABSOLUTE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", WEIGHTS)
def test_gradient_checkpointing(architecture, method):
    model = build(architecture, **FEW_ROUNDS[method]).train()
    ids = random_ids(2, 8)
    model(ids, labels=ids).loss.backward()
    expected = gradients(model)
    layers = "h" if architecture == "gpt2" else "layers"
    for is_reentrant in (False, True):
        model.zero_grad()
        model.gradient_checkpointing_enable({"use_reentrant": is_reentrant})
        calls = []
        mlp = model.base_model.get_submodule(f"{layers}.0.mlp")
        handle = mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(None))
        loss = model(ids, labels=ids).loss
        num_passes = len(calls)
        loss.backward()
        handle.remove()
        assert len(calls) == 2 * num_passes, "nothing was computed again"
        assert model(ids, use_cache=True).past_key_values is None
        for name, gradient in gradients(model).items():
            scale = max(float(expected[name].abs().max()), 1e-6)
            assert largest_difference(gradient, expected[name]) <= 1e-5 * scale, name


@pytest.mark.parametrize("method", METHODS)
def test_bf16(method):
    """Close to fp32, and of its own dtype."""
    # Which embeddings are the likeliest, rounding decides.
    model = build(**{**FEW_ROUNDS[method], "interpolation_use_topk": False})
    ids = random_ids(2, 8)
    with torch.no_grad():
        expected = model(ids).logits
        model = model.to(torch.bfloat16)
        logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    assert largest_difference(logits, expected) < 0.2 * float(expected.abs().max())
    assert model.generate(ids, **GREEDY).shape == (2, 14)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.float()(ids, labels=ids).loss.isfinite()


def test_embedding_scale_is_rounded():
    model = build(**METHODS["ponderlm2"]).to(torch.bfloat16)
    factor = torch.tensor(80.0**0.5, dtype=torch.bfloat16)
    ones = torch.ones(3, dtype=torch.bfloat16)
    assert torch.equal(model._scale(ones), ones * factor)
    assert float(factor) != 80.0**0.5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ponderlm2", "loop"])
def test_compile(method):
    smaller = {"num_latent_thoughts": 1, "num_jacobi_iterations": 1, "num_hidden_layers": 1}
    model = build(**{**METHODS[method], **smaller})
    ids = random_ids(2, 8)
    expected = model(ids, labels=ids)
    expected.loss.backward()
    expected_gradients = gradients(model)
    model.zero_grad()
    compiled = torch.compile(model)
    found = compiled(ids, labels=ids)
    assert largest_difference(found.logits, expected.logits) <= LOGITS_ABSOLUTE
    found.loss.backward()
    for name, gradient in gradients(model).items():
        scale = max(float(expected_gradients[name].abs().max()), 1e-6)
        assert largest_difference(gradient, expected_gradients[name]) <= 1e-5 * scale, name


@pytest.mark.parametrize("method", ["ponderlm2", "ponderlm", "loop", "pause"])
def test_a_compiled_forward_is_one_graph(method):
    """Traced without code generation: fast, and any break in the graph is an error."""
    model = build(**{**FEW_ROUNDS[method], "num_latent_thoughts": 1, "num_jacobi_iterations": 1})
    ids = random_ids(2, 8)
    expected = model(ids, use_cache=False).logits
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    found = compiled(ids, use_cache=False).logits
    assert largest_difference(found, expected) <= LOGITS_ABSOLUTE


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ponderlm2", "loop"])
def test_generation_on_a_compiled_forward(method):
    model = build(**{**FEW_ROUNDS[method], "num_latent_thoughts": 1, "num_jacobi_iterations": 1})
    ids = random_ids(2, 6)
    expected = model.generate(ids, **GREEDY)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    found = model.generate(ids, cache_implementation="static", **GREEDY)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_map(device_map, tmp_path):
    pytest.importorskip("accelerate")
    folder = export_case("llama_ponderlm2_k2_j2", tmp_path / "export")
    ids = random_ids(2, 8)
    load = AutoModelForCausalLM.from_pretrained
    model = load(folder, trust_remote_code=True, device_map=device_map)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    expected = load(folder, trust_remote_code=True)
    assert torch.equal(model(ids).logits, expected(ids).logits)
    model.generation_config.eos_token_id = expected.generation_config.eos_token_id = None
    assert torch.equal(model.generate(ids, **GREEDY), expected.generate(ids, **GREEDY))


@pytest.mark.parametrize("method", ["ponderlm2", "ponderlm", "loop"])
def test_layers_kept_elsewhere(method):
    """accelerate's hooks fetch weights for each call; the passes call the same layers again."""
    accelerate = pytest.importorskip("accelerate")
    model = build(**FEW_ROUNDS[method])
    ids = random_ids(2, 8)
    expected = model(ids).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert model.base_model.layers[0].mlp.up_proj.weight.device.type == "meta"
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("architecture", WEIGHTS)
def test_lora(architecture):
    peft = pytest.importorskip("peft")
    model = build(architecture, **FEW_ROUNDS["ponderlm2"])
    ids = random_ids(2, 8)
    before = model(ids).logits.detach()
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM"))
    modules = {"llama": ["q_proj", "v_proj"], "gpt_neox": ["query_key_value"], "gpt2": ["c_attn"]}
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, lora_alpha=16, target_modules=modules[architecture]
    )
    lora = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.SGD([p for p in lora.parameters() if p.requires_grad], lr=1.0)
    losses = []
    for _ in range(6):
        loss = lora(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 1e-3
    lora.eval()
    after = lora(input_ids=ids).logits.detach()
    assert largest_difference(after, before) > 1e-3
    generated = lora.generate(input_ids=ids, **GREEDY)
    merged = lora.merge_and_unload()
    assert type(merged) is type(model)
    assert largest_difference(merged(ids).logits, after) <= LOGITS_ABSOLUTE
    assert torch.equal(merged.generate(ids, **GREEDY), generated)


def test_trainer(tmp_path):
    pytest.importorskip("accelerate")
    model = build(random_jacobi_iterations=True)
    data = [{"input_ids": row, "labels": row} for row in random_ids(8, 8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", seed=1,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    predictions = trainer.predict(data)
    assert predictions.metrics["test_loss"] < before
    assert predictions.predictions.shape == (8, 8, 96)


def test_outputs_of_the_last_pass():
    model = build(**FEW_ROUNDS["ponderlm2"])
    model.set_attn_implementation("eager")
    ids = random_ids(2, 8)
    output = model(ids, output_hidden_states=True, output_attentions=True)
    assert [h.shape for h in output.hidden_states] == [(2, 24, 32)] * 3
    assert [a.shape for a in output.attentions] == [(2, 4, 24, 24)] * 2
    expected = model.get_output_embeddings()(output.hidden_states[-1][:, 2::3])
    assert largest_difference(output.logits, expected) <= LOGITS_ABSOLUTE
    loss, logits = model(ids, labels=ids, return_dict=False)[:2]
    assert torch.equal(logits, output.logits) and loss.ndim == 0


def test_packed_sequences_are_refused():
    model = build(**FEW_ROUNDS["ponderlm2"]).train()
    ids, positions = random_ids(1, 6), torch.tensor([[0, 1, 2, 0, 1, 2]])
    with pytest.raises(ValueError, match="packed sequences"):
        model(ids, position_ids=positions)
    with pytest.raises(ValueError, match="Packed sequences"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 3, 6]))
    assert model(ids, position_ids=positions.sort().values).logits.shape == (1, 6, 96)
