"""Whatever is wrong with a conversion: exit code 2, a reason, no traceback, no folder left."""

import json
import os
import pickle
import resource
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from tests.unit.convert.conversion import alone, config_of, convert, convert_well
from tests.unit.convert.stock_models import write_stock_model

pytestmark = pytest.mark.thorough

INDEX = "model.safetensors.index.json"


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def missing_shard(folder: Path) -> None:
    shards(folder)[1].unlink()


def truncated_shard(folder: Path) -> None:
    os.truncate(shards(folder)[1], shards(folder)[1].stat().st_size - 100)


def no_safetensors(folder: Path) -> None:
    shards(folder)[0].write_text("<html>not found</html>")


def index_of_another_model(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    name = "model.layers.0.mlp.up_proj.weight"
    other = next(file for file in index["weight_map"].values() if file != index["weight_map"][name])
    index["weight_map"][name] = other
    (folder / INDEX).write_text(json.dumps(index))


def index_that_leaves_the_folder(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["model.norm.weight"] = "../model.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


def broken_index(folder: Path) -> None:
    (folder / INDEX).write_text("{")


def change_config(folder: Path, **changes: object) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(folder) | changes))


def wrong_shape(folder: Path) -> None:
    change_config(folder, intermediate_size=96)


def missing_layer(folder: Path) -> None:
    change_config(folder, num_hidden_layers=5)


def superfluous_layer(folder: Path) -> None:
    change_config(folder, num_hidden_layers=3)


def tied_and_not(folder: Path) -> None:
    change_config(folder, tie_word_embeddings=True)


def unknown_architecture(folder: Path) -> None:
    change_config(folder, model_type="mamba")


def missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama",')


def code_of_its_own(folder: Path) -> None:
    (folder / "modeling_x.py").write_text("raise SystemExit('was run')")
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_x.X"})


def as_bin(folder: Path, content: object) -> None:
    for path in (*shards(folder), folder / INDEX):
        path.unlink()
    torch.save(content, folder / "pytorch_model.bin")


class Malicious:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("/tmp/megatron_ponder_was_unpickled",))


def pickled_code(folder: Path) -> None:
    as_bin(folder, {"model.norm.weight": Malicious()})


def old_pickle(folder: Path) -> None:
    as_bin(folder, {})
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Malicious()}))


def no_weights(folder: Path) -> None:
    for path in (*shards(folder), folder / INDEX):
        path.unlink()


def not_a_number(folder: Path) -> None:
    weights = load_file(shards(folder)[0])
    name = next(iter(weights))
    weights[name].view(-1)[3] = float("nan")
    save_file(weights, shards(folder)[0], {"format": "pt"})


def giant(folder: Path) -> None:
    change_config(folder, num_hidden_layers=10**9)


def deep_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 300 + "1" + "}" * 300)


def bottomless_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"a":' * 100_000)


def no_id(folder: Path) -> None:
    change_config(folder, eos_token_id=[1, "2"])


def broken_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("[]")


def quantised(folder: Path) -> None:
    whole = load_file(shards(folder)[0])
    save_file({name: t.to(torch.int8) for name, t in whole.items()}, shards(folder)[0])


def large_tokenizer(folder: Path) -> None:
    vocabulary = {f"token{i}": i for i in range(200)} | {"</s>": 200}
    Tokenizer(models.WordLevel(vocabulary, unk_token="token0")).save(str(folder / "tokenizer.json"))


def quantised_bin(folder: Path) -> None:
    whole = {k: tensor for path in shards(folder) for k, tensor in load_file(path).items()}
    as_bin(folder, {name: tensor.to(torch.int8) for name, tensor in whole.items()})


BAD_FOLDERS: dict[Callable[[Path], None], str] = {
    missing_shard: "weight files are missing: model-00002",
    truncated_shard: "no complete safetensors file",
    no_safetensors: "no complete safetensors file",
    index_of_another_model: "which model.safetensors.index.json says is there",
    index_that_leaves_the_folder: "names files outside of the folder",
    broken_index: "cannot be read",
    wrong_shape: "has shape [88, 32], must have [96, 32]",
    missing_layer: "model.layers.4.input_layernorm.weight is missing",
    superfluous_layer: "model.layers.3.input_layernorm.weight has no place in the model",
    tied_and_not: "lm_head.weight is not model.embed_tokens.weight",
    unknown_architecture: "model_type 'mamba' is not supported",
    missing_config: "there is no config.json",
    broken_config: "cannot be read",
    code_of_its_own: "comes with code of its own",
    pickled_code: "Only files that torch loads with weights_only are read",
    old_pickle: "cannot be read",
    no_weights: "there is neither model.safetensors nor",
    not_a_number: "are NaN or infinite",
    giant: "it describes a model of",
    deep_config: "nested more than 50 deep",
    bottomless_config: "cannot be read",
    no_id: "eos_token_id [1, '2']: must be an id",
    broken_generation_config: "must be a JSON object",
    quantised: "Quantised weights cannot be converted",
    quantised_bin: "is stored as torch.int8",
    large_tokenizer: "has 201 ids, but the model's vocabulary has 101",
}


def import_bad_folders(folder: Path) -> dict[str, tuple[int, str, list[str]]]:
    """By name of the damage: exit code, what was printed, and what is left beside the source."""
    found = {}
    write_stock_model("llama", folder / "whole", max_shard_size="100KB")
    for damage in BAD_FOLDERS:
        here = folder / damage.__name__
        shutil.copytree(folder / "whole", here / "source")
        damage(here / "source")
        code, printed = convert(
            "import", "--hf-path", str(here / "source"), "--save", str(here / "result")
        )
        found[damage.__name__] = (code, printed, sorted(path.name for path in here.iterdir()))
    return found


def test_bad_folders(tmp_path: Path) -> None:
    found = alone(import_bad_folders, tmp_path)
    for damage, reason in BAD_FOLDERS.items():
        code, printed, left = found[damage.__name__]
        assert code == 2 and reason in printed, (damage, printed)
        assert "Traceback" not in printed and left == ["source"], (damage, left)
        assert "report" not in printed
    assert not Path("/tmp/megatron_ponder_was_unpickled").exists()


def targets(folder: Path) -> None:
    """What is there stays: without --overwrite all of it, with it what no conversion wrote."""
    write_stock_model("gpt2", folder / "source")
    save = folder / "checkpoint"
    flags = ("import", "--hf-path", str(folder / "source"), "--save", str(save), "--no-verify")
    save.mkdir()
    convert_well(*flags)  # an empty folder is as good as none
    code, printed = convert(*flags)
    assert code == 2 and "is there and not empty" in printed
    (save / "iter_0000000" / "notes").mkdir()
    for name in ("mine", "iter_0000000/notes/mine"):
        (save / name).write_text("precious")
    before = (save / "iter_0000000" / "files.json").stat().st_ino
    (folder / "source" / "config.json").rename(folder / "config.json")
    assert convert(*flags, "--overwrite")[0] == 2
    assert (save / "iter_0000000" / "files.json").stat().st_ino == before
    (folder / "config.json").rename(folder / "source" / "config.json")
    convert_well(*flags, "--overwrite")
    assert (save / "iter_0000000" / "files.json").stat().st_ino != before
    for name in ("mine", "iter_0000000/notes/mine"):
        assert (save / name).read_text() == "precious"
    latest = save / "latest_checkpointed_iteration.txt"
    latest.write_text("10\n")  # as training would
    code, printed = convert(*flags, "--overwrite")
    assert code == 2 and f"{latest.name} would be lost" in printed and latest.read_text() == "10\n"
    latest.write_text("0\n")
    for target in (folder, folder / "source"):
        code, printed = convert(*flags[:3], "--save", str(target), "--overwrite")
        assert code == 2 and "contains the source" in printed
    (folder / "file").write_text("")
    code, printed = convert(*flags[:3], "--save", str(folder / "file"), "--overwrite")
    assert code == 2 and "is a file" in printed
    code, printed = convert(*flags[:3], "--save", str(folder / "file" / "below"))
    assert code == 2 and "Traceback" not in printed
    code, printed = convert(
        "export", "--load", str(save), "--hf-path", str(save), "--without-tokenizer", "--overwrite"
    )
    assert code == 2 and "contains the source" in printed
    code, printed = convert("export", "--load", str(folder / "source"), "--hf-path", "x")
    assert code == 2 and "is a Hugging Face folder" in printed
    exports(folder, save)
    names = {"source", "checkpoint", "file", "out", "theirs"}
    assert {path.name for path in folder.iterdir()} == names


def exports(folder: Path, save: Path) -> None:
    """The same for the other way; a run without a tokenizer exports with a warning."""
    out = folder / "out"
    flags = ("export", "--load", str(save), "--hf-path", str(out), "--no-verify")
    assert "names no tokenizer" in convert_well(*flags, "--max-shard-size", "40KB")
    (out / "mine").mkdir()
    (out / "mine" / "adapter.safetensors").write_text("precious")
    convert_well(*flags, "--overwrite")
    assert (out / "mine" / "adapter.safetensors").read_text() == "precious"
    assert [path.name for path in shards(out)] == ["model.safetensors"]
    assert not (out / INDEX).exists()
    (out / "README.md").write_text("my own words")
    code, printed = convert(*flags, "--overwrite")
    assert code == 2 and "README.md would be lost" in printed
    assert (out / "README.md").read_text() == "my own words" and shards(out)
    theirs = folder / "theirs"
    write_stock_model("gpt2", theirs)
    content = {path.name: path.read_bytes() for path in theirs.iterdir()}
    code, printed = convert(*flags[:3], "--hf-path", str(theirs), "--overwrite")
    assert code == 2 and "config.json would be lost" in printed
    assert content == {path.name: path.read_bytes() for path in theirs.iterdir()}


def test_targets(tmp_path: Path) -> None:
    alone(targets, tmp_path)


def foreign_code(folder: Path) -> dict[str, tuple[int, str]]:
    """Code that comes with a folder: refused, run where asked, or not looked at."""
    os.environ["HF_MODULES_CACHE"] = str(folder / "modules")
    write_stock_model("llama", folder / "source")
    (folder / "source" / "modeling_x.py").write_text(
        "from pathlib import Path\nfrom transformers import LlamaForCausalLM\n"
        f"Path({str(folder / 'was_run')!r}).touch()\n\n\nclass X(LlamaForCausalLM):\n    pass\n"
    )
    change_config(folder / "source", auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    found = {}
    for flag in ("--no-verify", "--trust-remote-code"):
        assert not (folder / "was_run").exists()
        flags = ("--hf-path", str(folder / "source"), "--save", str(folder / flag))
        found[flag] = convert("import", *flags, flag)
    assert (folder / "was_run").exists()
    return found


def test_foreign_code(tmp_path: Path) -> None:
    found = alone(foreign_code, tmp_path)
    assert [code for code, _ in found.values()] == [0, 0], found
    assert "was not compared" in found["--no-verify"][1]
    assert "largest difference of logits" in found["--trust-remote-code"][1]


def full_disk(folder: Path) -> Iterator[tuple[int, str]]:
    """Writing fails behind 60 kB of a file: with an error that names no file."""
    write_stock_model("llama", folder / "source")
    convert_well("import", "--hf-path", str(folder / "source"), "--save", str(folder / "good"))
    results = []
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    for command in (
        ("import", "--hf-path", str(folder / "source"), "--save", str(folder / "bad")),
        ("export", "--load", str(folder / "good"), "--hf-path", str(folder / "bad"))
        + ("--without-tokenizer",),
    ):
        results.append(convert(*command))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    return results


def test_full_disk(tmp_path: Path) -> None:
    for code, printed in alone(full_disk, tmp_path):
        assert code == 2 and "cannot be written: File too large" in printed, printed
        assert "Traceback" not in printed
    assert {path.name for path in tmp_path.iterdir()} == {"source", "good"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path: Path) -> None:
    write_stock_model("gpt2", tmp_path / "source")
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(stat.S_IRUSR | stat.S_IXUSR)
    flags = ("--hf-path", str(tmp_path / "source"), "--save", str(tmp_path / "locked" / "result"))
    code, printed = alone(convert, "import", *flags)
    assert code == 2 and "Permission denied" in printed


def test_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also that --help needs no torch, which tests/e2e/test_convert.py measures."""
    for arguments, reason in (
        (["no-such-command"], "must come first: import or export"),
        (["export", "--load", "x", "--hf-path", "y", "--max-shard-size", "0GB"], "0GB: must be"),
        (["export", "--load", "x", "--hf-path", "y", "--max-shard-size", "5 apples"], "must be"),
        (["export", "--load", "x", "--hf-path", "y", "--ckpt-step", "-1"], "--ckpt-step -1"),
    ):
        code, printed = convert(*arguments)
        assert code == 2 and reason in printed, printed
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, printed = convert("export", "--load", "x", "--hf-path", "y")
    assert code == 2 and "takes one process" in printed
