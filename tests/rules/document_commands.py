"""The shell commands of README.md and docs/: what they are, and what they become at tiny size.

A shell block is fenced as ```sh. Commands within a sentence begin with a program and stand between
backticks; those are examples that need what the reader has, and are parsed but not run.
"""

import re
import shlex
from collections.abc import Sequence

from tests.rules.sources import ROOT, tracked_files

DOCUMENTS = [
    path
    for path in tracked_files()
    if path == "README.md" or re.fullmatch(r"docs/[\w-]+\.md", path) and path != "docs/LOG.md"
]
PROGRAMS = ("python", "torchrun", "make", "pip", "docker", "sbatch", "kubectl")
_BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", re.M | re.S)
_INLINE = re.compile(rf"`((?:{'|'.join(PROGRAMS)}) [^`]+)`")

NOT_RUN = {
    "make": "installs packages from the network, or runs the tests; tests/e2e tries the quickstart",
    "pip": "installs packages from the network",
    "docker": "needs Docker",
    "tools/gpu_report.py": "needs a GPU; tests/e2e/test_benchmark.py runs it on a tiny shape",
}
"""Commands that are only parsed, with the reason."""

TINY_MODEL = (
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 64 --num-attention-heads 4 "
    "--seq-length 64 --micro-batch-size 1"
)
TINY = {
    # program and, if it has one, its command: flags put last, so that they win
    "tools/train_tokenizer.py": "--vocab-size 320",
    "tools/preprocess_data.py": "--workers 1",
    "tools/prepare_index.py": "--world-size 2 --train-iters 2",
    "tools/plan.py scaling": "--world-sizes 8",
    "tools/generate.py": "--max-new-tokens 4",
    "tools/evaluate.py": "--max-tokens 200",
    "tools/benchmark.py train": f"{TINY_MODEL} --rounds 1 --steps 1 --warmup-steps 1",
    "tools/benchmark.py curves": f"{TINY_MODEL} --rounds 1 --variables thoughts --k-values 0 1",
    "tools/benchmark.py generate": f"{TINY_MODEL} --prompt-tokens 8 --new-tokens 4 --rounds 1",
    "tools/benchmark.py preprocess": "--max-bytes 20000 --vocab-size 320 --rounds 1 --workers 1",
    "megatron_ponder.pretrain": f"{TINY_MODEL} --train-iters 2 --global-batch-size 2 --eval-iters 1"
    " --num-workers 0 --kernels torch",
}
_OWN_SHAPE = ("runs/start/iter_0000000/run_config.yaml", "examples/quickstart/pretrain.yaml")
"""Configs of models that are small already."""


def blocks(text: str) -> list[list[str]]:
    """The commands of each shell block, with continued lines joined."""
    found = (body for language, body in _BLOCK.findall(text) if language == "sh")
    return [_lines(body) for body in found]


def all_commands(text: str) -> list[str]:
    """Every command of a document, those within sentences too."""
    outside = _BLOCK.sub("", text)
    inline = [" ".join(command.split()) for command in _INLINE.findall(outside)]
    return [*(command for block in blocks(text) for command in block), *inline]


def unmarked(text: str) -> list[str]:
    """Lines that begin with a program in a block that is not marked as shell."""
    bodies = (body for language, body in _BLOCK.findall(text) if language != "sh")
    return [
        line
        for body in bodies
        for line in _lines(body)
        if line.startswith(("python ", "torchrun "))
    ]


def split(command: str) -> list[str]:
    """The words of a command without variables before it, comments and redirections."""
    words = shlex.split(command, comments=True)
    while re.match(r"[A-Z_]+=", words[0]):
        words = words[1:]
    return words[: words.index(">")] if ">" in words else words


def program(words: Sequence[str]) -> str:
    """What a command starts: a script or module, with its command if it has some."""
    if words[0] not in ("python", "torchrun"):
        return words[0]
    position = 1
    while words[position].startswith("--"):
        position += 1 if words[position] == "--standalone" else 2
    if words[position] == "-m":
        return words[position + 1]
    following = words[position + 1] if position + 1 < len(words) else "--"
    return words[position] if following.startswith("-") else f"{words[position]} {following}"


def tiny(command: str) -> str | None:
    """The command with small sizes; None: it is not run."""
    name = program(split(command))
    if name.split()[0] in NOT_RUN:
        return None
    flags = TINY.get(name, "")
    if any(config in command for config in _OWN_SHAPE):
        flags = flags.replace(TINY_MODEL, "--seq-length 64")
    if name == "tools/benchmark.py curves" and "--preset" not in command:
        flags = flags.replace(TINY_MODEL, "")  # without settings it takes a small model of its own
    command, arrow, output = command.partition(" > ")
    command = re.sub(r"--nproc-per-node \d+", "--standalone --nproc-per-node 2", command)
    command = re.sub(r"--stride \d+", "--stride 16", command)
    return f"{command} {flags}{arrow}{output}"


def arguments(words: Sequence[str]) -> list[str]:
    """The arguments of the program."""
    name = program(words).split()
    return list(words[words.index(name[0]) + 1 :])


def missing_files(words: Sequence[str]) -> list[str]:
    """Scripts of this repository that a command names and that are not there."""
    scripts = [word for word in words if word.endswith(".py")]
    return [script for script in scripts if not (ROOT / script).is_file()]


def _lines(body: str) -> list[str]:
    joined = re.sub(r"\\\n\s*", "", body)
    return [line.strip() for line in joined.splitlines() if line.strip()]
