"""Runs the commands of README.md and docs/ in their order, at tiny size, as in a fresh clone.

A document's commands run in a folder that holds the repository, what the document says that the
reader has, and what the documents before it (AFTER) have left.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
import transformers

from tests.e2e.launch import ROOT
from tests.rules.document_commands import DOCUMENTS, blocks, tiny
from tests.unit.data.corpora import texts, train_json_tokenizer, write_json_lines

AFTER = {
    "docs/train.md": "docs/data.md",
    "docs/adding-a-method.md": "docs/data.md",
    "docs/generate.md": "README.md",
}
RUN_YAML = """
preset: llama-125m
num_layers: 2
tokenizer_model: tokenizer.model
data_path: [data/corpus_text_document]
"""
WITH_COMMANDS = [
    path for path in DOCUMENTS if any(map(tiny, sum(blocks((ROOT / path).read_text()), [])))
]
TIMEOUT_S = 600


@pytest.mark.slow
@pytest.mark.parametrize("path", WITH_COMMANDS)
def test_commands_run(path: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = left_by(path, tmp_path_factory.getbasetemp())
    assert (folder / "done").read_text() == "all commands ran"


def left_by(path: str, base: Path) -> Path:
    """The folder in which a document's commands have run, once per session."""
    folder = base / path.replace("/", "-")
    if folder.exists():
        assert (folder / "done").exists(), f"commands of {path} failed before"
        return folder
    if path in AFTER:
        shutil.copytree(left_by(AFTER[path], base), folder, symlinks=True)
        (folder / "done").unlink(missing_ok=True)
    else:
        folder.mkdir()
        write_inputs(folder)
    for block in blocks((ROOT / path).read_text("utf-8")):
        for command in filter(None, map(tiny, block)):
            run(command, folder)
    (folder / "done").write_text("all commands ran")
    return folder


def run(command: str, folder: Path) -> None:
    """Run a command as a shell does in which the environment is active."""
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    ended = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert ended.returncode == 0, f"{command}\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"


def write_inputs(folder: Path) -> None:
    """The repository, and what documents say that the reader has: text and stock models."""
    for name in ("megatron_ponder", "tools", "benchmarks", "tests", "examples"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("corpus", "more", "chapters", "models", "docs/assets", "docs/benchmarks"):
        (folder / name).mkdir(parents=True)
    write_json_lines(folder / "corpus.jsonl", texts(1500))  # each share of --split gets documents
    write_json_lines(folder / "held_out.jsonl", texts(40))
    write_json_lines(folder / "more" / "part.jsonl", texts(20))
    for copy in ("corpus.jsonl.zst", "corpus/part.jsonl.zst"):
        with pyarrow.output_stream(folder / copy, compression="zstd") as file:
            file.write((folder / "corpus.jsonl").read_bytes())
    (folder / "book.txt").write_text("\n".join(texts(10)))
    (folder / "chapters" / "one.txt").write_text(texts(2)[0])
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "bal"}) + "\n")
    (folder / "run.yaml").write_text(RUN_YAML)
    shape = {
        "vocab_size": 304,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "eos_token_id": 0,
    }
    for name, family in (("pythia-410m", "GPTNeoX"), ("llama", "Llama")):
        model_folder = train_json_tokenizer(folder / "models" / name, "<|endoftext|>")
        (model_folder / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
        config = getattr(transformers, f"{family}Config")(**shape)
        model = getattr(transformers, f"{family}ForCausalLM")(config)
        model.save_pretrained(model_folder)
