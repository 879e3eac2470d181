"""Starting runs as a user does, on a small dataset; and reading what they left.

`start_torchrun` is for tests of the launch itself: each process imports for seconds. `train` and
`run_main` call the entry point in ranks that are forked with everything imported.
"""

import contextlib
import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing

from megatron_ponder.data.preprocess import PreprocessConfig, preprocess
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
VOCAB_SIZE = 64
LAUNCH_TIMEOUT_S = 180

SMALL = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 64,
    "seq_length": 32,
    "vocab_size": VOCAB_SIZE,
    "make_vocab_size_divisible_by": 16,
    "tokenizer_type": "NullTokenizer",
    "split": "90,10,0",
    "micro_batch_size": 4,
    "global_batch_size": 8,
    "lr": 1e-2,
    "lr_warmup_iters": 2,
    "num_workers": 0,
    "eval_iters": 2,
    "log_interval": 1,
}


def write_dataset(folder: Path) -> str:
    """A dataset of documents that count up modulo the vocabulary, which a model learns at once.

    Returns:
        The prefix for --data-path.
    """
    draw = random.Random(0)
    with (folder / "corpus.jsonl").open("w") as file:
        for _ in range(60):
            start, length = draw.randrange(VOCAB_SIZE - 1), draw.randrange(20, 120)
            ids = [(start + i) % (VOCAB_SIZE - 1) for i in range(length)]
            file.write(json.dumps({"text": " ".join(map(str, ids))}) + "\n")
    preprocess(
        PreprocessConfig(
            input=(str(folder / "corpus.jsonl"),),
            output_prefix=str(folder / "corpus"),
            tokenizer_type="NullTokenizer",
            vocab_size=VOCAB_SIZE,
            append_eod=True,
            workers=1,
        )
    )
    return str(folder / "corpus_text_document")


def flags(**settings: Any) -> list[str]:
    """Settings as command-line arguments, on top of SMALL; a setting that is None is left out."""
    arguments = []
    for name, value in {**SMALL, **settings}.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            arguments += [flag, str(value)]
    return arguments


def start_torchrun(num_ranks: int, arguments: list[str]) -> subprocess.Popen:
    """torchrun with one thread per rank; its output is read with `communicate`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.Popen(
        [
            *command,
            "--nproc-per-node",
            str(num_ranks),
            "-m",
            "megatron_ponder.pretrain",
            *arguments,
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run_main(arguments: list[str], world_size: int = 1) -> tuple[int, str, str]:
    """Call the entry point in forked ranks.

    Returns:
        Exit code, stdout and stderr of rank 0.
    """
    return run_ranks(_main, world_size, arguments)[0]


def train(arguments: list[str], world_size: int = 1) -> str:
    """Call the entry point in forked ranks; stdout of rank 0. Fails the test if the run fails."""
    by_rank = run_ranks(_main, world_size, arguments)
    for code, out, err in by_rank:
        assert code == 0, out + err
    return by_rank[0][1]


def _main(arguments: list[str]) -> tuple[int, str, str]:
    """The entry point, with its output caught."""
    from megatron_ponder.pretrain import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as exit_:
            code = int(exit_.code or 0)
    return code, out.getvalue(), err.getvalue()


def records(folder: Path, split: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of one split, without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    clock = ("elapsed_ms_per_iteration", "tokens_per_s", "tflops_per_device", "mfu", "eta_s")
    return [
        {k: v for k, v in record.items() if k not in (*clock, "peak_memory_gib")}
        for record in map(json.loads, lines)
        if record["split"] == split
    ]


def losses(folder: Path) -> dict[int, float]:
    """Training loss by iteration."""
    return {record["iteration"]: record["lm_loss"] for record in records(folder, "train")}


def stored_tensors(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: weights and optimizer state."""
    checkpoint = str(folder / f"iter_{iteration:07d}")
    return run_ranks(_load_tensors, 1, checkpoint)[0]


def _load_tensors(checkpoint: str) -> dict[str, torch.Tensor]:
    """Inside a rank."""
    stored = dist_checkpointing.load_plain_tensors(checkpoint)
    return {name: value for name, value in stored.items() if isinstance(value, torch.Tensor)}
