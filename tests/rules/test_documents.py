"""What documents and examples say is there: links, flags, settings, files."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from benchmarks.commands import COMMANDS
from benchmarks.gpu_report import GpuReportOptions
from megatron_ponder.config.parse import parse_args
from megatron_ponder.config.resolve import resolve
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.convert.options import ExportOptions, ImportOptions
from megatron_ponder.data.inspection import InspectConfig
from megatron_ponder.data.merging import MergeConfig
from megatron_ponder.data.options import PrepareIndexOptions
from megatron_ponder.data.preprocess import PreprocessConfig
from megatron_ponder.data.sentencepiece_training import TokenizerTrainingConfig
from megatron_ponder.inference.options import (
    CheckpointOptions,
    EvaluateOptions,
    GenerateOptions,
    SamplingOptions,
)
from megatron_ponder.planning.options import PlanOptions, ScalingOptions
from megatron_ponder.runtime.diagnosis import DoctorOptions
from tests.rules.sources import ROOT, tracked_files

OPTIONS = (
    ImportOptions,
    ExportOptions,
    *(command.options for command in COMMANDS.values()),
    GpuReportOptions,
    PlanOptions,
    ScalingOptions,
    DoctorOptions,
    PreprocessConfig,
    TokenizerTrainingConfig,
    MergeConfig,
    InspectConfig,
    PrepareIndexOptions,
    CheckpointOptions,
    EvaluateOptions,
    GenerateOptions,
    SamplingOptions,
)
OTHERS_FLAGS = frozenset(
    # torchrun, docker, pip, mypy, tests.mutation, our entry points' own, the quickstart
    "nproc-per-node standalone nnodes redirects log-dir rdzv-endpoint target rm gpus ipc config "
    "preset reproduce-authors help folder fresh methods count all strict".split()
)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z0-9-]+)")
DOCUMENTS = [path for path in tracked_files() if path.endswith(".md")]
YAMLS = [
    path
    for path in tracked_files()
    if path.startswith("examples/") and path.endswith(".yaml") and "kubernetes" not in path
]


def known_flags() -> set[str]:
    names = set(RunConfig().to_flat_dict())
    for options in OPTIONS:
        names |= {field.name for field in dataclasses.fields(options)}
    flags = {name.replace("_", "-") for name in names}
    return flags | {f"no-{flag}" for flag in flags} | OTHERS_FLAGS


def dead_links(path: str, text: str) -> list[str]:
    targets = [target for target in LINK.findall(text) if "://" not in target]
    return [target for target in targets if not (ROOT / path).parent.joinpath(target).exists()]


def unknown_flags(text: str) -> list[str]:
    return [flag for flag in FLAG.findall(text) if flag not in known_flags()]


@pytest.mark.parametrize("path", DOCUMENTS)
def test_links_and_flags_exist(path: str) -> None:
    text = (ROOT / path).read_text("utf-8")
    assert not dead_links(path, text)
    assert not unknown_flags(text)


def test_documents_are_there() -> None:
    names = "train data methods parallelism performance troubleshooting architecture glossary LOG"
    assert {"README.md", *(f"docs/{name}.md" for name in names.split())} <= set(DOCUMENTS)


def test_dead_links_and_unknown_flags_are_found() -> None:
    assert dead_links("docs/LOG.md", "[a](nowhere.md) [b](LOG.md) [c](https://x.org/)") == [
        "nowhere.md"
    ]
    assert unknown_flags("`--num-layer 3`, `--num-layers 3`, `--no-bf16`") == ["num-layer"]


@pytest.mark.parametrize("path", YAMLS)
def test_examples_make_a_run(path: str) -> None:
    """On 8 ranks, with the flags that their headers tell to add."""
    data = ["--data-path", "x", "--tokenizer-model", "y", "--save", "z", "--load", "z"]
    ranks = 2 if "quickstart" in path else 8
    config = parse_args(["--config", str(ROOT / path), *data], prog="test")
    resolve(config, world_size=ranks, tokenizer_vocab_size=config.model.vocab_size or 2048)


def test_every_architecture_has_a_recipe_of_every_method() -> None:
    for folder in ("llama", "pythia", "gpt2"):
        names = {Path(path).name.split("-")[0] for path in YAMLS if f"/{folder}/" in path}
        assert names == {"vanilla", "ponderlm2", "ponderlm", "loop", "pause"}


@pytest.mark.parametrize("path", YAMLS)
def test_recipes_say_where_the_authors_differ(path: str) -> None:
    """And the flag that they name sets every setting that they say it sets."""
    if path.startswith(("examples/gpt2", "examples/quickstart")):
        return
    text = (ROOT / path).read_text()
    assert "--reproduce-authors" in text
    config = parse_args(["--config", str(ROOT / path), "--reproduce-authors"], prog="test")
    assert not config.data.eod_as_target and "is never a target" in text
    assert (config.model.norm_epsilon == 0.1) == ("epsilon 0.1" in text)


def test_what_the_images_copy_is_there() -> None:
    text = (ROOT / "Dockerfile").read_text()
    stages = re.findall(r"^FROM \S+ AS (\S+)$", text, re.M)
    assert stages == ["cpu", "gpu"]
    for line in re.findall(r"^COPY (.+)$", text, re.M):
        for source in shlex.split(line)[:-1]:
            assert (ROOT / source).exists(), source


def test_what_make_help_lists_is_in_the_makefile() -> None:
    text = (ROOT / "Makefile").read_text()
    for target in ("install", "quickstart", "test", "test-all", "check"):
        assert re.search(rf"^{target}:.*## ", text, re.M), target
    assert "make check" in (ROOT / ".ci/run").read_text()
