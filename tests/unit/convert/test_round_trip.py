"""Hugging Face to a checkpoint and back: every bit of every weight, and the same logits.

The models are transformers' own, and what they compute is the truth.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_ponder.checkpoint.reader import locate
from megatron_ponder.checkpoint.stored_config import read_config
from megatron_ponder.config.resolve import resolve_for_inference
from megatron_ponder.convert.verification import folder_logits, native_logits
from megatron_ponder.runtime.distributed import running
from tests.golden.cases import FOLDER, NAMES, load_case
from tests.parity.tolerances import LOGITS_ABSOLUTE, largest_difference
from tests.unit.convert.conversion import (
    alone,
    config_of,
    convert,
    convert_well,
    export,
    round_trip,
    stored_weights,
)
from tests.unit.convert.special_ids import SPECIAL_IDS, assert_same_generation, set_ids
from tests.unit.convert.stock_models import MODELS, build_stock_model, write_stock_model

pytestmark = pytest.mark.thorough

IDS = torch.randint(101, (2, 20), generator=torch.Generator().manual_seed(3))


def checkpoint_logits(folder: Path, ids: Tensor) -> Tensor:
    """What our model computes from a checkpoint."""
    checkpoint = locate(folder)
    config = resolve_for_inference(read_config(checkpoint), num_ranks=1)
    with running(config.parallel, seed=1):
        return native_logits(checkpoint, config, ids)


def assert_same_weights(source: Path, result: Path) -> None:
    before, after = stored_weights(source), stored_weights(result)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def round_trips(folder: Path) -> dict[str, float]:
    """Every stock model; the largest difference of logits by model."""
    found = {}
    for number, name in enumerate(MODELS):
        here = folder / str(number)
        write_stock_model(name, here / "source")
        set_ids(here / "source", *SPECIAL_IDS[config_of(here / "source")["model_type"]])
        result = round_trip(here / "source", here, verify=False)
        assert_same_weights(here / "source", result)
        assert_same_generation(here / "source", result)
        model = AutoModelForCausalLM.from_pretrained(result).eval()
        with torch.no_grad():
            expected = build_stock_model(name)(IDS).logits
            assert torch.equal(model(IDS).logits, expected), name
        ours = checkpoint_logits(here / "checkpoint", IDS)
        found[name] = largest_difference(ours, expected)
        assert type(model).__name__ == config_of(result)["architectures"][0]
    return found


def test_stock_models(tmp_path: Path) -> None:
    """Architectures, rope forms, biases, tied embeddings, special ids."""
    found = alone(round_trips, tmp_path)
    assert len(found) == len(MODELS)
    assert max(found.values()) <= LOGITS_ABSOLUTE, found


def golden_round_trips(folder: Path) -> dict[str, float]:
    found = {}
    for name in NAMES:
        case = load_case(name)
        result = round_trip(FOLDER / name, folder / name, verify=False)
        after = stored_weights(result)
        repeated = case.weights.keys() - after.keys()
        assert repeated <= {"lm_head.weight"}
        assert all(torch.equal(after[key], case.weights[key]) for key in after), name
        is_stock = case.config.method.method == "vanilla"
        ours = None if is_stock else case.config.model.architecture
        logits = folder_logits(result, case.input_ids, ours=ours, trust_remote_code=False)
        found[name] = largest_difference(logits, case.logits)
        native = checkpoint_logits(folder / name / "checkpoint", case.input_ids)
        found[f"{name}, native"] = largest_difference(native, case.logits)
        code = (result / "modeling_ponder.py").exists()
        assert code is not is_stock and ("method" in config_of(result)) is not is_stock
    return found


def test_golden_cases(tmp_path: Path) -> None:
    """Exactly, and the exported form gives the authors' logits."""
    found = alone(golden_round_trips, tmp_path)
    assert len(found) == 28 and max(found.values()) <= LOGITS_ABSOLUTE, found


def authors_folders(folder: Path) -> dict[str, float]:
    """Golden cases as the authors' code saves them: R whatever the method is, and no name of it."""
    found = {}
    for name in ("llama_loop_k2", "llama_ponderlm_k2", "gpt_neox_pause_k2"):
        case, source, save = load_case(name), folder / name, folder / f"of {name}"
        shutil.copytree(FOLDER / name, source)
        config = config_of(source) | {"num_jacobi_iterations": 3, "interpolation_use_topk": True}
        method = config.pop("method")
        (source / "config.json").write_text(json.dumps(config))
        flags = ("--hf-path", str(source), "--save", str(save), "--no-verify")
        code, printed = convert("import", *flags)
        assert code == 2 and "Give the method" in printed and not save.exists(), printed
        convert_well("import", *flags, "--method", method)
        found[name] = largest_difference(checkpoint_logits(save, case.input_ids), case.logits)
    return found


def test_the_authors_folders(tmp_path: Path) -> None:
    """Asked for their method, and then with the authors' logits."""
    found = alone(authors_folders, tmp_path)
    assert max(found.values()) <= LOGITS_ABSOLUTE, found


def other_files(folder: Path) -> None:
    """Shards, .bin files, names without the base prefix, a head that is stored twice, buffers."""
    name = "gpt2"
    write_stock_model(name, folder / "plain")
    whole = stored_weights(folder / "plain")
    write_stock_model(name, folder / "sharded", max_shard_size="40KB")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 2
    for kind in ("bin", "bare", "repeated"):
        (folder / kind).mkdir()
        (folder / kind / "config.json").write_text(json.dumps(config_of(folder / "plain")))
    torch.save(whole, folder / "bin" / "pytorch_model.bin")
    bare = {key.removeprefix("transformer."): tensor for key, tensor in whole.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    save_file(bare, folder / "bare" / "model.safetensors", {"format": "pt"})
    repeated = whole | {"lm_head.weight": whole["transformer.wte.weight"].clone()}
    save_file(repeated, folder / "repeated" / "model.safetensors", {"format": "pt"})
    for kind in ("sharded", "bin", "bare", "repeated"):
        result = round_trip(folder / kind, folder / f"of {kind}")
        assert_same_weights(folder / "plain", result)
    several = folder / "several"
    export(folder / "of bin" / "checkpoint", several, "--max-shard-size", "40KB")
    assert len(list(several.glob("model-0000*-of-0000*.safetensors"))) > 2
    assert_same_weights(folder / "plain", several)
    index = json.loads((several / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(t.numel() for t in whole.values())
    expected = build_stock_model(name)(IDS).logits
    assert torch.equal(AutoModelForCausalLM.from_pretrained(several)(IDS).logits, expected)


def test_other_files(tmp_path: Path) -> None:
    alone(other_files, tmp_path)


def dtypes(folder: Path) -> None:
    """bf16 stays bf16; fp16 becomes fp32, which holds it; exports in the other precision."""
    model = build_stock_model("qwen3")
    for dtype in (torch.bfloat16, torch.float16):
        model.to(dtype).save_pretrained(folder / str(dtype))
        result = round_trip(folder / str(dtype), folder / f"of {dtype}")
        before, after = stored_weights(folder / str(dtype)), stored_weights(result)
        kept = dtype if dtype == torch.bfloat16 else torch.float32
        assert {tensor.dtype for tensor in after.values()} == {kept}
        assert all(torch.equal(after[name], before[name].to(kept)) for name in before)
        assert config_of(result)["torch_dtype"] == str(kept).removeprefix("torch.")
    checkpoint = folder / "of torch.float16" / "checkpoint"
    export(checkpoint, folder / "rounded", "--dtype", "bf16")
    rounded = stored_weights(folder / "rounded")
    assert all(torch.equal(rounded[name], after[name].bfloat16()) for name in after)
    export(folder / "of torch.bfloat16" / "checkpoint", folder / "wide", "--dtype", "fp32")
    assert {tensor.dtype for tensor in stored_weights(folder / "wide").values()} == {torch.float32}


def test_dtypes(tmp_path: Path) -> None:
    alone(dtypes, tmp_path)


def thoughts_on_stock_models(folder: Path) -> None:
    """Continual pretraining: other methods on vanilla weights; a row for the pause token."""
    write_stock_model("llama", folder / "source")
    weights = stored_weights(folder / "source")
    thinking = ("--method", "ponderlm2", "--num-latent-thoughts", "2")
    result = round_trip(folder / "source", folder / "thinking", *thinking)
    stored = read_config(locate(folder / "thinking" / "checkpoint")).method
    assert (stored.method, stored.num_latent_thoughts, stored.scale_embeds) == (
        "ponderlm2",
        2,
        False,
    )
    assert config_of(result)["num_latent_thoughts"] == 2
    assert_same_weights(folder / "source", result)

    result = round_trip(folder / "source", folder / "pausing", "--method", "pause")
    config = config_of(result)
    assert (config["vocab_size"], config["pause_token_id"]) == (102, 101)
    after = stored_weights(result)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name][:101], weights[name])
        assert torch.equal(after[name][101], weights[name].mean(dim=0))
    again = round_trip(result, folder / "again")
    assert_same_weights(result, again)


def test_thoughts_on_stock_models(tmp_path: Path) -> None:
    alone(thoughts_on_stock_models, tmp_path)


def a_swapped_weight(folder: Path) -> str:
    """Verification has teeth: a model whose up and gate projections are swapped on the way."""
    import torch as torch_

    from megatron_ponder.convert import importing
    from megatron_ponder.errors import ConversionError

    write_stock_model("llama", folder / "source")
    original = importing._Weights.fetch

    def swapped(self: importing._Weights, name: str) -> Tensor:
        tensor = original(self, name)
        return torch_.cat(tensor.chunk(2)[::-1]) if "1.mlp.linear_fc1" in name else tensor

    importing._Weights.fetch = swapped  # type: ignore[method-assign]
    options = importing.ImportOptions(hf_path=str(folder / "source"), save=str(folder / "out"))
    with pytest.raises(ConversionError, match="Source and result differ") as raised:
        importing.import_checkpoint(options)
    assert sorted(path.name for path in folder.iterdir()) == ["source"]
    convert_well("import", "--hf-path", options.hf_path, "--save", options.save, "--no-verify")
    return str(raised.value)


def test_what_is_wrong_is_not_written(tmp_path: Path) -> None:
    alone(a_swapped_weight, tmp_path)
