"""Measures training speed and memory beside plain PyTorch, and the pipeline beside its simulation.

    python tools/benchmark.py train --config examples/quickstart/pretrain.yaml --vocab-size 2048
    python tools/benchmark.py train --json --preset pythia-160m --bf16 --micro-batch-size 8
    python tools/benchmark.py train --config X.yaml --r-values 0 1 2 3 4 --plot memory.png
    python tools/benchmark.py pipeline --json --config X.yaml --vocab-size 2048 \
        --no-random-jacobi-iterations --pipeline-model-parallel-size 2

Both take every setting of megatron_ponder.pretrain that says what a step computes (model, method,
batch, precision, layout), and the flags below.

`train`: both sides run in one process each, take the same steps from the same weights, and are
timed in turns; their first losses must agree.

`pipeline`: runs training steps on as many CPU processes as the layout has ranks, one thread each (2
pipeline stages and 4 micro-batches for each, unless said otherwise), and compares the step's time
and bubble with what the simulator makes of the durations. It wants a core per rank to itself.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from megatron_ponder.benchmark.options import PipelineBenchmarkOptions, TrainBenchmarkOptions
from megatron_ponder.config.parse import parse_args
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import ConfigError, exit_on_user_error


@exit_on_user_error
def main() -> None:
    """Parse flags, measure, print."""
    commands: dict[str, Callable[[Sequence[str]], None]] = {"train": _train, "pipeline": _pipeline}
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        command, arguments = "train", ["--help"]
    elif command not in commands:
        raise ConfigError(f"{command}: what to measure must come first: {', '.join(commands)}.")
    commands[command](arguments)


def _train(arguments: Sequence[str]) -> None:
    options, config = _parse(TrainBenchmarkOptions, "train", arguments)
    from megatron_ponder.benchmark.report import as_table, draw_by_r
    from megatron_ponder.benchmark.train import benchmark_training

    result = benchmark_training(options, config)
    print(json.dumps(result, indent=1) if options.json else as_table(result))
    if options.plot:
        draw_by_r(result, Path(options.plot))


def _pipeline(arguments: Sequence[str]) -> None:
    options, config = _parse(PipelineBenchmarkOptions, "pipeline", arguments)
    from megatron_ponder.benchmark.pipeline import as_text, benchmark_pipeline, draw_measured

    result, measured = benchmark_pipeline(options, config)
    print(json.dumps(result, indent=1) if options.json else as_text(result))
    if options.timeline:
        draw_measured(measured, result, Path(options.timeline))


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
