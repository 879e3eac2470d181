"""The converter as a user calls it, and its folders as others load them: by transformers alone."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_ponder.checkpoint.progress import Progress
from megatron_ponder.checkpoint.writer import save_checkpoint
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.data.tokenizers import build_tokenizer
from tests.commands import run_forked, run_fresh
from tests.ranks import run_ranks
from tests.unit.checkpoint.small_run import build_training_state, small_config
from tests.unit.convert.conversion import config_of
from tests.unit.convert.stock_models import write_stock_model
from tests.unit.data import corpora

TEXT = "bak dom\n  tef()"
LOAD = """
import sys
for name in ("megatron", "megatron_ponder"):
    sys.modules[name] = None  # importing it fails
import json, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, text = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer(text, return_tensors="pt")
made = model.generate(**ids, max_new_tokens=3, do_sample=False)
print(json.dumps({
    "ids": ids["input_ids"][0].tolist(), "class": type(model).__name__, "made": made.shape[1],
    "eos": [each.eos_token_id for each in (tokenizer, model.generation_config, model.config)],
}))
"""


def convert(*arguments: str, run: Callable = run_forked) -> str:
    """The converter; its log."""
    ended = run("tools/convert_checkpoint.py", *arguments)
    assert ended.returncode == 0, ended.stderr
    assert "Warning" not in ended.stderr and "Traceback" not in ended.stderr, ended.stderr
    return ended.stdout


def load_elsewhere(folder: Path) -> dict[str, Any]:
    """What a fresh process without this package makes of a folder."""
    ended = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder), TEXT],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        | {"HF_MODULES_CACHE": str(folder.parent / "modules"), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def save_run(config: RunConfig) -> None:
    """A checkpoint of a run that has done 5 iterations (inside a rank)."""
    training_state = build_training_state(config)
    save_checkpoint(
        config,
        chunks=training_state.model.chunks,
        optimizer=training_state.optimizer,
        scheduler=training_state.scheduler,
        progress=Progress(iteration=5, consumed_tokens=123456),
    )


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A SentencePiece model, and a tokenizers JSON, by kind."""
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "SentencePieceTokenizer": corpora.train_tokenizer(folder),
        "HuggingFaceTokenizer": str(corpora.train_json_tokenizer(folder / "hf", "<|endoftext|>")),
    }


@pytest.mark.parametrize(
    "kind",
    [
        "SentencePieceTokenizer",
        pytest.param("HuggingFaceTokenizer", marks=pytest.mark.slow),
    ],
)
def test_export_with_its_tokenizer(kind: Any, tokenizers: dict[str, str], tmp_path: Path) -> None:
    """Loads and generates elsewhere, with the run's ids; and comes back with its tokenizer."""
    config = small_config(
        tokenizer_type=kind,
        tokenizer_model=tokenizers[kind],
        vocab_size=corpora.VOCAB_SIZE + 9,
        save=str(tmp_path / "run"),
    )
    run_ranks(save_run, 1, config)
    records = [
        {"split": "valid", "iteration": 5, "lm_loss": 1.25, "perplexity": 3.4903},
        {"split": "valid", "iteration": 9, "lm_loss": 0.5, "perplexity": 1.6487},
        {"split": "train", "iteration": 5, "lm_loss": 9.0},
    ]
    lines = [json.dumps(record) + "\n" for record in records]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(lines) + '{"split": "val')
    folder = tmp_path / "exported"
    told = convert("export", "--load", str(tmp_path / "run"), "--hf-path", str(folder))
    assert "largest difference of logits" in told
    tokenizer = build_tokenizer(config.data)
    found = load_elsewhere(folder)
    assert found["ids"] == tokenizer.tokenize(TEXT)
    assert found["class"] == "PonderLlamaForCausalLM"
    assert found["eos"] == [tokenizer.eod] * 3
    assert len(found["ids"]) < found["made"] <= len(found["ids"]) + 3
    card = (folder / "README.md").read_text()
    for fact in ("5 iterations, 123,456 tokens", "| valid | 5 | 1.2500 | 3.4903 |", "ponderlm2"):
        assert fact in card, card
    assert "0.5000" not in card and "9.0" not in card

    convert("import", "--hf-path", str(folder), "--save", str(tmp_path / "back"))
    from megatron_ponder.checkpoint.reader import locate
    from megatron_ponder.checkpoint.stored_config import read_config

    back = read_config(locate(tmp_path / "back"))
    again = build_tokenizer(back.data)
    assert again.tokenize(TEXT) == found["ids"] and again.eod == tokenizer.eod
    assert back.model.vocab_size == config.model.vocab_size


def test_stock_export_has_no_code(tmp_path: Path) -> None:
    """In fresh interpreters, which must need nothing of this process and warn of nothing."""
    source, checkpoint, folder = (str(tmp_path / name) for name in ("hf", "run", "exported"))
    write_stock_model("qwen3", Path(source))
    convert("import", "--hf-path", source, "--save", checkpoint, run=run_fresh)
    flags = ("--load", checkpoint, "--hf-path", folder, "--without-tokenizer")
    convert("export", *flags, run=run_fresh)
    assert not list(Path(folder).glob("*.py")) and "auto_map" not in config_of(Path(folder))


def test_help_needs_no_torch() -> None:
    for arguments in (["--help"], ["import", "--help"], ["export", "--help"]):
        ended = run_fresh("-X", "importtime", "tools/convert_checkpoint.py", *arguments)
        assert ended.returncode == 0 and "--hf-path" in ended.stdout
        imported = {line.split("|")[-1].strip() for line in ended.stderr.splitlines()}
        assert "tyro" in imported and not imported & {"torch", "transformers", "megatron.core"}
