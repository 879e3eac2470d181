"""Measures training, the pipeline, and preprocessing, each beside something to compare it with.

    python tools/benchmark.py train --json --preset pythia-160m --bf16 --micro-batch-size 8
    python tools/benchmark.py train --config X.yaml --r-values 0 1 2 3 4 --plot memory.png
    python tools/benchmark.py pipeline --json --config X.yaml --pipeline-model-parallel-size 2
    python tools/benchmark.py preprocess --json --input corpus.jsonl.zst

`train` (beside plain PyTorch, in turns) and `pipeline` (beside the simulator, on a CPU core per
rank) take the settings of pretraining that say what a step computes, and the flags below.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from megatron_ponder.benchmark import options as flags
from megatron_ponder.config.parse import parse_args
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import ConfigError, exit_on_user_error


@exit_on_user_error
def main() -> None:
    """Parse flags, measure, print."""
    commands = {"train": _train, "pipeline": _pipeline, "preprocess": _preprocess}
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        command, arguments = "train", ["--help"]
    elif command not in commands:
        raise ConfigError(f"{command}: what to measure must come first: {', '.join(commands)}.")
    commands[command](arguments)


def _train(arguments: Sequence[str]) -> None:
    options, config = _parse(flags.TrainBenchmarkOptions, "train", arguments)
    from megatron_ponder.benchmark.report import as_table, draw_by_r
    from megatron_ponder.benchmark.train import benchmark_training

    result = benchmark_training(options, config)
    print(json.dumps(result, indent=1) if options.json else as_table(result))
    if options.plot:
        draw_by_r(result, Path(options.plot))


def _pipeline(arguments: Sequence[str]) -> None:
    options, config = _parse(flags.PipelineBenchmarkOptions, "pipeline", arguments)
    from megatron_ponder.benchmark.pipeline import as_text, benchmark_pipeline, draw_measured

    result, measured = benchmark_pipeline(options, config)
    print(json.dumps(result, indent=1) if options.json else as_text(result))
    if options.timeline:
        draw_measured(measured, result, Path(options.timeline))


def _preprocess(arguments: Sequence[str]) -> None:
    options = tyro.cli(flags.PreprocessBenchmarkOptions, description=__doc__, args=arguments)
    from megatron_ponder.benchmark.preprocess import as_text, benchmark_preprocessing

    result = benchmark_preprocessing(options)
    print(json.dumps(result, indent=1) if options.json else as_text(result))


def _parse(kind: type, command: str, arguments: Sequence[str]) -> tuple[Any, RunConfig]:
    prog = f"tools/benchmark.py {command}"
    options, settings = tyro.cli(
        kind, prog=prog, description=__doc__, args=arguments, return_unknown_args=True
    )
    config = parse_args(settings, prog=prog)
    from megatron_ponder import log

    log.configure()  # before imports that warn
    return options, config


if __name__ == "__main__":
    sys.exit(main())
