"""Every command of README.md and docs/ is one that its program accepts."""

import contextlib
import importlib
import importlib.util
import io
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import parse_args as parse_torchrun

from megatron_ponder.config.parse import parse_args
from megatron_ponder.errors import ConfigError
from tests.rules import document_commands as documents
from tests.rules.sources import ROOT

PARSED_ELSEWHERE = ("pip", "docker", "tests.parity.table", "tests.unit.planning.scaling_document")
"""Commands of others, and modules that take no flags."""


def check(command: str, folder: Path) -> None:
    """Fails if a program would refuse the command before it starts to work."""
    words = documents.split(command)
    assert not documents.missing_files(words)
    if words[0] == "torchrun":
        words = ["torchrun", *_without_torchrun(words[1:])]
    name = documents.program(words).split()[0]
    if name == "make":
        targets = [word for word in words[1:] if "=" not in word]
        for target in targets:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    elif name.startswith("tests."):
        assert importlib.util.find_spec(name)
    elif name not in PARSED_ELSEWHERE:
        given = _with_empty_configs(documents.arguments(words), folder)
        with contextlib.suppress(SystemExit) if "--help" in given else contextlib.nullcontext():
            with contextlib.redirect_stdout(io.StringIO()):
                _parser(name)(given)


def _parser(name: str) -> Callable[[list[str]], Any]:
    if name == "megatron_ponder.pretrain":
        return lambda given: parse_args(given, prog=name)
    return runpy.run_path(str(ROOT / name))["parse"]


def _without_torchrun(words: list[str]) -> list[str]:
    """The script or module that torchrun starts, after torchrun has accepted its own flags."""
    options = parse_torchrun(words)
    start = ["-m"] if options.module else []
    return [*start, options.training_script, *options.training_script_args]


def _with_empty_configs(given: list[str], folder: Path) -> list[str]:
    """Configs that only a run makes, or the reader has, replaced by an empty one."""
    empty = folder / "empty.yaml"
    empty.touch()
    for position, word in enumerate(given[:-1]):
        if word == "--config":
            path = ROOT / given[position + 1]
            given[position + 1] = str(path if path.is_file() else empty)
    return given


@pytest.mark.parametrize("path", documents.DOCUMENTS)
def test_commands_are_accepted(path: str, tmp_path: Path) -> None:
    text = (ROOT / path).read_text("utf-8")
    assert documents.unmarked(text) == []
    for command in documents.all_commands(text):
        try:
            check(command, tmp_path)
        except (SystemExit, ConfigError) as error:
            pytest.fail(f"{path}: {command}\n{error}")


@pytest.mark.parametrize(
    "command",
    [
        "python tools/plan.py --world-sizes 8",
        "python tools/nowhere.py --json",
        "torchrun --nproc-per-nodes 8 -m megatron_ponder.pretrain --bf16",
        "torchrun --nproc-per-node 8 -m megatron_ponder.pretrain --bf16 true",
        "OMP_NUM_THREADS=1 python tools/generate.py --load x --prompt y --top-k many > z",
        "make tests",
    ],
)
def test_a_wrong_command_is_found(command: str, tmp_path: Path) -> None:
    with pytest.raises((AssertionError, SystemExit, ConfigError)):
        check(command, tmp_path)


def test_commands_are_found() -> None:
    text = "See `make test`.\n```sh\npython a.py \\\n    --b 1   # why\npython c.py > d\n```\n"
    assert documents.all_commands(text) == [
        "python a.py --b 1   # why",
        "python c.py > d",
        "make test",
    ]
    assert documents.unmarked("```\npython a.py\n```") == ["python a.py"]
    assert documents.split("X=1 python a.py --b 'c d' > e # f") == ["python", "a.py", "--b", "c d"]
    assert documents.program(["torchrun", "--nproc-per-node", "2", "-m", "x.y", "--z"]) == "x.y"
    assert (
        len(
            {c for p in documents.DOCUMENTS for c in documents.all_commands((ROOT / p).read_text())}
        )
        > 40
    )
