"""Configuration keys, old and new, round trips of a folder, and what is refused."""

import io
import json
import logging

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_ponder.convert import exported_code
from megatron_ponder.convert.family import family_names
from megatron_ponder.convert.remote_code import configuration_ponder
from megatron_ponder.convert.remote_code.configuration_ponder import SETTINGS, PonderLlamaConfig
from megatron_ponder.errors import ConversionError
from tests.hf.exports import CASES, NAMES, SHAPE, build, export_case, random_ids
from tests.hf.test_generation import GREEDY


@pytest.fixture
def warnings():
    """What transformers says about configurations."""
    logger, stream = logging.getLogger("transformers.configuration_utils"), io.StringIO()
    handler = logging.StreamHandler(stream)
    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_defaults_and_old_names():
    assert {name: getattr(PonderLlamaConfig(), name) for name in SETTINGS} == SETTINGS
    old = {"more_iterations": 3, "eval_refinement_steps": 5, "vary_refine_steps": True}
    config = PonderLlamaConfig(**old)
    assert config.num_latent_thoughts == 3
    assert config.num_jacobi_iterations == 5
    assert config.random_jacobi_iterations is True
    assert PonderLlamaConfig(**old, num_latent_thoughts=2).num_latent_thoughts == 2
    written = config.to_dict()
    assert not old.keys() & written.keys() and SETTINGS.keys() <= written.keys()


def test_a_plain_model_by_the_authors_key():
    """recurrent_model false: one pass, unscaled, as the stock class."""
    ids = random_ids(2, 6)
    plain = build(recurrent_model=False, num_latent_thoughts=2)
    vanilla = build(method="vanilla")
    stock = transformers.LlamaForCausalLM(plain.config).eval()
    stock.load_state_dict(plain.state_dict())
    assert torch.equal(plain(ids).logits, stock(ids).logits)
    assert torch.equal(vanilla(ids).logits, stock(ids).logits)
    assert torch.equal(
        plain.generate(ids, **GREEDY), stock.generate(ids, eos_token_id=None, **GREEDY)
    )


def test_stock_code_refuses_an_export(tmp_path):
    """It would load the same weights as a plain model, whose loss is another."""
    folder = export_case("llama_ponderlm2_k2_j2", tmp_path / "export")
    for load in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            load(folder, trust_remote_code=False)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.pipeline("text-generation", model=str(folder), trust_remote_code=False)


def test_a_class_by_name_reads_the_weights_and_is_warned(tmp_path, warnings):
    """As the authors' classes do: their config class is the stock one, and reads their keys."""
    folder = export_case("llama_ponderlm2_k2_j2", tmp_path / "export")
    model, found = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert "of type" in warnings.getvalue() and "ponder_llama" in warnings.getvalue()
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert (model.config.num_latent_thoughts, model.config.num_jacobi_iterations) == (2, 2)
    original = load_file(CASES / "llama_ponderlm2_k2_j2" / "model.safetensors")
    assert torch.equal(model.lm_head.weight, original["lm_head.weight"])


@pytest.mark.parametrize("name", ["llama_ponderlm2_k2_j2", "gpt_neox_ponderlm2_k1_j3"])
def test_exports_with_a_stock_model_type(name, tmp_path, warnings):
    """As older versions wrote them: read without a warning, and saved with our own."""
    folder = export_case(name, tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    ours, stock = config["model_type"], config["model_type"].removeprefix("ponder_")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": stock}))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert not warnings.getvalue()
    case = load_file(CASES / name / "case.safetensors")
    assert torch.allclose(model(case["input_ids"]).logits, case["logits"], atol=1e-5)
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["model_type"] == ours


def test_the_authors_checkpoints_load(tmp_path, monkeypatch):
    """No `method`, no code, stock weight names: their keys are enough for our class."""
    folder = export_case("gpt_neox_ponderlm2_k1_j3", tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    del config["method"], config["auto_map"]
    config["model_type"] = "gpt_neox"
    config["architectures"] = ["GPTNeoXForCausalLM"]
    (folder / "config.json").write_text(json.dumps(config))
    from megatron_ponder.convert.remote_code import configuration_ponder
    from megatron_ponder.convert.remote_code.modeling_ponder import PonderGPTNeoXForCausalLM

    told = []
    monkeypatch.setattr(configuration_ponder.logger, "warning_once", told.append)
    model = PonderGPTNeoXForCausalLM.from_pretrained(folder)
    assert told and all("does not name their method" in text for text in told)
    case = load_file(CASES / "gpt_neox_ponderlm2_k1_j3" / "case.safetensors")
    assert torch.allclose(model(case["input_ids"]).logits, case["logits"], atol=1e-5)


@pytest.mark.parametrize("name", [name for name in NAMES if "ponderlm2_k2" in name])
def test_save_and_load_again(name, tmp_path):
    """Twice over: weights, stock names, settings and code survive."""
    folder = export_case(name, tmp_path / "export")
    first = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = random_ids(2, 6)
    for turn in range(2):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        folder = tmp_path / f"saved{turn}"
        model.save_pretrained(folder)
        architecture = json.loads((CASES / name / "config.json").read_text())["model_type"]
        config = json.loads((folder / "config.json").read_text())
        assert config["auto_map"] == exported_code.auto_map(architecture)
        assert config["architectures"] == [exported_code.class_name(architecture)]
        assert config["model_type"] == exported_code.model_type(architecture)
        original = json.loads((CASES / name / "config.json").read_text())
        for key in SETTINGS.keys() & original.keys():
            assert config[key] == original[key]
        state, expected = (load_file(path / "model.safetensors") for path in (folder, CASES / name))
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state)
    again = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(again).__name__ == type(first).__name__
    assert torch.equal(again(ids).logits, first(ids).logits)


def test_settings_at_loading(tmp_path):
    folder = export_case("llama_ponderlm2_k1_j3", tmp_path / "export")
    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, num_jacobi_iterations=7, num_latent_thoughts=2
    )
    assert model.config.num_jacobi_iterations == 7
    assert model(random_ids(1, 4)).jacobi_iterations == 7
    assert model.config.slots_per_token == 3
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (config.num_jacobi_iterations, config.num_latent_thoughts) == (3, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ponder"}, "method = 'ponder' is none of vanilla, ponderlm2"),
        ({"num_latent_thoughts": -1}, "num_latent_thoughts = -1 is not a whole number from 0"),
        ({"num_jacobi_iterations": 1.5}, "num_jacobi_iterations = 1.5 is not a whole number"),
        ({"interpolation_topk": 0}, "interpolation_topk = 0 is not a whole number from 1"),
        ({"min_jacobi_iterations": 5}, "min_jacobi_iterations = 5 is larger than"),
        ({"method": "pause"}, "pause_token_id = None is no row"),
        ({"method": "pause", "pause_token_id": 32000}, "pause_token_id = 32000 is no row"),
        ({"method": "ponderlm", "ponderlm_feedback": "x"}, "ponderlm_feedback = 'x' is none of"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        PonderLlamaConfig(**settings)


def test_sliding_windows_are_refused():
    with pytest.raises(ValueError, match="set sliding_window to null"):
        build("mistral", **{**SHAPE, "sliding_window": 4})
    assert build("qwen2", **SHAPE) is not None


def test_old_transformers_is_refused():
    oldest = configuration_ponder.OLDEST_TRANSFORMERS
    for version in (oldest, "4.100.0", "5.0.0rc1", transformers.__version__):
        configuration_ponder.check_transformers(version)
    for version in ("4.9.2", "4.49.0.dev0"):
        with pytest.raises(ImportError, match=f"needs transformers {oldest} or newer, {version}"):
            configuration_ponder.check_transformers(version)


def test_files_of_an_export(tmp_path):
    exported_code.copy_remote_code(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"configuration_ponder.py", "modeling_ponder.py", "thought_cache.py"} <= names
    assert "__init__.py" not in names
    for architecture in family_names():
        for reference in exported_code.auto_map(architecture).values():
            module, name = reference.split(".")
            assert f"class {name}(" in (tmp_path / f"{module}.py").read_text()
    with pytest.raises(ConversionError, match="mamba"):
        exported_code.auto_map("mamba")
