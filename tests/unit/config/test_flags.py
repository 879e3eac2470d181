"""Mistyped flags: one line for each, which says what to write instead."""

import dataclasses
import re

import pytest

from megatron_ponder.config.foreign_flags import HINTS
from megatron_ponder.config.parse import parse_args, parse_options, parse_options_and_settings
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.data.preprocess import PreprocessConfig
from megatron_ponder.errors import ConfigError
from megatron_ponder.inference.options import EvaluateOptions
from megatron_ponder.planning.options import PlanOptions


def complaint(*argv: str) -> list[str]:
    with pytest.raises(ConfigError) as error:
        parse_args(argv, prog="test")
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--bf16", "true"], "--bf16 true: a switch takes no value. Write --bf16 to"),
        (["--bf16=true"], "--no-bf16 to switch it off"),
        (["--no_bf16", "false"], "Write --bf16 to switch it on"),
        (["--learning-rate", "1e-3"], "--learning-rate: no such flag. Here it is --lr."),
        (["--swiglu"], "Here it is --activation swiglu (the default)."),
        (["--use_flash_attn"], "Here it is --attention-backend"),
        (["--override-opt_param-scheduler"], "the flags of a run win over its checkpoint"),
        (["--num-layer=3"], "Did you mean --num-layers or"),
        (["--qqq"], "--qqq: no such flag. test --help lists all flags."),
    ],
)
def test_what_to_write_instead(argv: list[str], expected: str) -> None:
    (line,) = complaint(*argv)
    assert expected in line


def test_all_problems_at_once() -> None:
    assert len(complaint("--bf16", "true", "--swiglu", "--lr", "1", "--xyz")) == 3


def test_what_is_right_stays_right() -> None:
    config = parse_args(["--bf16", "--num_layers=3", "--no-bf16", "--lr", "-1"], prog="test")
    assert config.model.num_layers == 3 and not config.training.bf16 and config.optimizer.lr == -1


def test_a_yaml_key_gets_the_same_hint(tmp_path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1\n")
    assert complaint("--config", str(path)) == [
        f"{path}: learning_rate: no such setting. Here it is --lr."
    ]


def test_tools_hint_at_their_own_flags_only() -> None:
    with pytest.raises(ConfigError, match=r"--learning-rate: no such flag. tool --help"):
        parse_options(
            EvaluateOptions, ["--load", "x", "--learning-rate", "1"], prog="tool", description=""
        )
    given = ["--input", "x", "--output-prefix", "y", "--vocab-file", "z", "--append-eod", "yes"]
    with pytest.raises(ConfigError, match=r"a switch takes no value.*\n.*it is --tokenizer-model"):
        parse_options(PreprocessConfig, given, prog="tool", description="")


def test_tools_that_take_settings() -> None:
    options, config = parse_options_and_settings(
        PlanOptions, ["--world-size", "8", "--lr", "2"], prog="tool", description=""
    )
    assert (options.world_size, config.optimizer.lr) == (8, 2)
    with pytest.raises(
        ConfigError, match=r"--world-size is missing: .* for example --world-size 8"
    ):
        parse_options_and_settings(PlanOptions, [], prog="tool", description="")
    for given in (["--swiglu"], ["--json", "true"], ["--bf16", "true"]):
        with pytest.raises(ConfigError, match=re.escape(given[0])):
            parse_options_and_settings(
                PlanOptions, ["--world-size", "8", *given], prog="tool", description=""
            )


def test_hints_name_flags_that_exist_and_none_is_needed_for_ours() -> None:
    kinds = (RunConfig(), PreprocessConfig(input=("x",), output_prefix="y", append_eod=True))
    settings = set(kinds[0].to_flat_dict()) | {f.name for f in dataclasses.fields(kinds[1])}
    ours = {name.replace("_", "-") for name in settings} | {"config"}
    for name, hint in HINTS.items():
        assert name not in ours
        assert set(re.findall(r"--([a-z][\w-]*)", hint)) <= ours, name
