"""Measures training, and preprocessing, beside plain code on this machine.

    python tools/benchmark.py train --config examples/quickstart/pretrain.yaml --vocab-size 2048
    python tools/benchmark.py train --json --preset pythia-160m --bf16 --micro-batch-size 8
    python tools/benchmark.py train --config X.yaml --r-values 0 1 2 3 4 --plot memory.png
    python tools/benchmark.py preprocess --json --input corpus.jsonl.zst

`train` takes every setting of megatron_ponder.pretrain that says what a step computes (model,
method, batch, precision), and the flags below. Both sides run in one process each, take the same
steps from the same weights, and are timed in turns; their first losses must agree.

`preprocess` compares with a loop over the same tokenizer in one process; both must write the same
files.
"""

import json
import sys
from pathlib import Path

import tyro

from megatron_ponder.benchmark.options import PreprocessBenchmarkOptions, TrainBenchmarkOptions
from megatron_ponder.config.parse import parse_args
from megatron_ponder.errors import ConfigError, exit_on_user_error

COMMANDS = ("train", "preprocess")


@exit_on_user_error
def main() -> None:
    """Find out what to measure."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        command, arguments = "train", ["--help"]
    if command not in COMMANDS:
        raise ConfigError(f"{command}: what to measure must come first: {', '.join(COMMANDS)}.")
    measure = {"train": train, "preprocess": preprocess}[command]
    measure(f"tools/benchmark.py {command}", arguments)


def train(prog: str, arguments: list[str]) -> None:
    """Parse flags, measure, print."""
    options, settings = tyro.cli(
        TrainBenchmarkOptions,
        prog=prog,
        description=__doc__,
        args=arguments,
        return_unknown_args=True,
    )
    config = parse_args(settings, prog=prog)
    from megatron_ponder import log

    log.configure()  # before the imports below, some of which warn
    from megatron_ponder.benchmark.report import as_table, draw_by_r
    from megatron_ponder.benchmark.train import benchmark_training

    result = benchmark_training(options, config)
    print(json.dumps(result, indent=1) if options.json else as_table(result))
    if options.plot:
        draw_by_r(result, Path(options.plot))


def preprocess(prog: str, arguments: list[str]) -> None:
    """Parse flags, measure, print."""
    options = tyro.cli(PreprocessBenchmarkOptions, prog=prog, description=__doc__, args=arguments)
    from megatron_ponder import log

    log.configure()  # before the import below, which warns
    from megatron_ponder.benchmark.preprocess import as_text, benchmark_preprocessing

    result = benchmark_preprocessing(options)
    print(json.dumps(result, indent=1) if options.json else as_text(result))


if __name__ == "__main__":
    sys.exit(main())
