"""Defaults, presets, YAML and flags: which wins, what is refused, and round trips."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from docstring_parser import parse_from_object

from megatron_ponder.config.parse import config_from_flat_dict, dump_yaml, parse_args
from megatron_ponder.config.presets import PRESETS
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import ConfigError
from tests.fuzz import damaged_bytes, damaged_value, survive


def parse(*argv: str) -> RunConfig:
    return parse_args(argv, prog="test")


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text)
    return str(path)


def test_nothing_given_is_the_defaults() -> None:
    assert parse() == RunConfig()


def test_later_sources_win(tmp_path: Path) -> None:
    """Default < preset < YAML < flag, each visible in one setting."""
    path = write(tmp_path, "preset: llama-410m\nnum_layers: 7\nhidden-size: 96\n")
    config = parse("--config", path, "--hidden-size", "64")
    assert config.model.hidden_size == 64
    assert config.model.num_layers == 7
    assert config.model.ffn_hidden_size == 2752
    assert config.model.norm_epsilon == RunConfig().model.norm_epsilon


def test_a_preset_on_the_command_line_replaces_the_files(tmp_path: Path) -> None:
    path = write(tmp_path, "preset: llama-410m\nnum_layers: 7\n")
    config = parse(f"--config={path}", "--preset", "gpt2")
    assert config.model.architecture == "gpt2" and config.model.num_layers == 7


def test_a_flag_can_switch_off_what_yaml_switched_on(tmp_path: Path) -> None:
    path = write(tmp_path, "bf16: true\nuse_distributed_optimizer: true\n")
    config = parse("--config", path, "--no-bf16")
    assert not config.training.bf16 and config.parallel.use_distributed_optimizer


def test_every_kind_of_value_in_yaml(tmp_path: Path) -> None:
    path = write(
        tmp_path, "lr: 3e-4\ndata_path: [1, a, 2, b]\nsave: runs/x\nmin_lr: null\ntrain_iters: 5\n"
    )
    config = parse("--config", path)
    assert config.optimizer.lr == 3e-4 and config.optimizer.min_lr is None
    assert config.data.data_path == ("1", "a", "2", "b")
    assert config.checkpoint.save == "runs/x" and config.training.train_iters == 5


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_parse(preset: str) -> None:
    config = parse("--preset", preset)
    stated = {**PRESETS[preset]}
    assert {k: v for k, v in config.to_flat_dict().items() if k in stated} == stated


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("num_layer: 3", ["num_layer: no such setting", "num_layers"]),
        ("num_layers: many", ["num_layers: 'many' does not fit int"]),
        ("bf16: 7", ["bf16: 7 does not fit bool"]),
        ("normalization: Batch", ["normalization: 'Batch' does not fit", "RMSNorm"]),
        ("preset: llama-9", ["no such preset", "llama-410m"]),
        ("- a\n- b", ["must be a mapping"]),
        ("a: [", ["not valid YAML"]),
        ("preset: [1]", ["--preset [1]: no such preset"]),
        ("preset: ''", ["no such preset"]),
        ("data_path: [[a]]", ["data_path: must be a value or a list of values"]),
        ("save: {a: b}", ["save: must be a value or a list of values"]),
        ("num_layers: 4\nnum-layers: 8", ["num_layers is stated twice"]),
        ("[" * 3000, ["nested too deeply"]),
        ("lr: " + "9" * 5000, ["not valid YAML"]),
        ("lr: !!timestamp x", ["not valid YAML"]),
        ("lr: 2026-13-45", ["not valid YAML"]),
        ('save: "\\0"', ["save: has a character that no setting takes"]),
    ],
)
def test_what_yaml_cannot_say(text: str, expected: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        parse("--config", path)
    for part in expected:
        assert part in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["bytes", "values"])
def test_damaged_yaml_is_read_or_refused(damage: str, tmp_path: Path) -> None:
    settings = {
        "preset": "llama-410m", "num_layers": 12, "data_path": [0.5, "a", 0.5, "b"],
        "lr": 1e-3, "bf16": True, "min_lr": None, "vocab_size": 1000,
    }  # fmt: skip
    text = yaml.safe_dump(settings, sort_keys=False).encode()
    path = tmp_path / "run.yaml"

    def read(content: object) -> None:
        if not isinstance(content, bytes):
            content = yaml.safe_dump(content, sort_keys=False).encode("utf-8", "surrogatepass")
        path.write_bytes(content)
        resolve(parse("--config", str(path)), world_size=1)

    if damage == "bytes":
        found = survive(read, lambda draw: damaged_bytes(text, draw), seed=4)
    else:
        found = survive(read, lambda draw: damaged_value(settings, draw), seed=5)
    assert found["read"] > 10 and found["refused"] > 100


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read"):
        parse("--config", "nowhere.yaml")


@pytest.mark.parametrize("argv", [["--num-layers", "x"], ["stray"]])
def test_what_flags_cannot_say(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse(*argv)
    assert exit_.value.code == 2
    assert "num-layers" in capsys.readouterr().err or argv == ["stray"]


def test_round_trips(tmp_path: Path) -> None:
    config = parse("--preset", "gpt2", "--data-path", "0.5", "a", "--lr", "0.001", "--bf16")
    assert config_from_flat_dict(config.to_flat_dict()) == config
    assert config_from_flat_dict(yaml.safe_load(dump_yaml(config))) == config
    assert parse("--config", write(tmp_path, dump_yaml(config))) == config


def test_a_config_of_another_version_is_refused() -> None:
    with pytest.raises(ConfigError, match="unknown to this version: from_the_future"):
        config_from_flat_dict({"from_the_future": 1})


def test_help_teaches_and_imports_no_torch() -> None:
    program = """
import dataclasses, sys
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.pretrain import main
try:
    main(["--help"])
except SystemExit as exit_:
    assert not exit_.code
assert not {"torch", "numpy", "megatron.core"} & set(sys.modules)
for group in dataclasses.fields(RunConfig):
    for field in dataclasses.fields(group.type):
        assert "\\n" not in field.metadata["help"], "a line break is left in the text"
"""
    narrow = os.environ | {"COLUMNS": "80"}
    command = [sys.executable, "-c", program]
    shown = subprocess.run(command, capture_output=True, text=True, env=narrow)
    assert shown.returncode == 0, shown.stderr
    words = " ".join(shown.stdout.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())
    for group in dataclasses.fields(RunConfig):
        kinds = [kind for kind in group.type.__mro__ if dataclasses.is_dataclass(kind)]
        params = [param for kind in kinds for param in parse_from_object(kind).params]
        texts = {param.arg_name: param.description for param in params}
        assert texts.keys() == {field.name for field in dataclasses.fields(group.type)}
        for text in texts.values():
            assert " ".join(text.split()) in words
    for part in (
        "torchrun",
        "--num-jacobi-iterations",
        "llama-410m",
        "--use-distributed",
    ):
        assert part in shown.stdout


def test_the_authors_settings_win_over_files_and_lose_to_flags(tmp_path: Path) -> None:
    path = write(tmp_path, "preset: llama-410m\nnorm_epsilon: 0.01\neod_as_target: true\n")
    config = parse("--config", path, "--reproduce-authors")
    assert (config.model.norm_epsilon, config.data.eod_as_target) == (0.1, False)
    config = parse("--config", path, "--reproduce-authors", "--norm-epsilon", "1e-6")
    assert (config.model.norm_epsilon, config.data.eod_as_target) == (1e-6, False)
    config = parse("--preset", "pythia-70m", "--reproduce-authors")
    assert config.model.norm_epsilon == 1e-5 and not config.data.eod_as_target
    assert config.method.ponderlm_feedback == "hidden"
    path = write(tmp_path, "preset: llama-410m\nreproduce_authors: true\n")
    assert parse("--config", path).model.norm_epsilon == 0.1
    assert parse("--config", path, "--no-reproduce-authors").model.norm_epsilon == 1e-5
    with pytest.raises(ConfigError, match="no files for gpt2, only for llama and gpt_neox"):
        parse("--preset", "gpt2", "--reproduce-authors")
    with pytest.raises(ConfigError, match="reproduce_authors: 'maybe' is neither true nor false"):
        parse("--config", write(tmp_path, "reproduce_authors: maybe\n"))
