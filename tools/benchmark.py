"""Measures training, the pipeline, generation and preprocessing, each beside something like it.

    python tools/benchmark.py train --json --preset pythia-160m --bf16 --micro-batch-size 8
    python tools/benchmark.py train --config X.yaml --r-values 0 1 2 3 4 --plot memory.png
    python tools/benchmark.py pipeline --json --config X.yaml --pipeline-model-parallel-size 2
    python tools/benchmark.py generate --json --preset pythia-70m --prompt-tokens 1024
    python tools/benchmark.py preprocess --json --input corpus.jsonl.zst

`train` (beside plain PyTorch, in turns), `pipeline` (beside the simulator, on a CPU core per rank)
and `generate` (with a cache beside without) take the settings of pretraining and the flags below.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from megatron_ponder.benchmark import options as flags
from megatron_ponder.errors import ConfigError, exit_on_user_error


@exit_on_user_error
def main() -> None:
    """Parse flags, measure, print."""
    commands = {
        "train": _train,
        "pipeline": _pipeline,
        "generate": _generate,
        "preprocess": _preprocess,
    }
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        command, arguments = "train", ["--help"]
    elif command not in commands:
        raise ConfigError(f"{command}: what to measure must come first: {', '.join(commands)}.")
    commands[command](arguments)


def _train(arguments: Sequence[str]) -> None:
    options, config = flags.parse(flags.TrainBenchmarkOptions, "train", arguments, __doc__)
    from megatron_ponder.benchmark.report import as_table, draw_by_r
    from megatron_ponder.benchmark.train import benchmark_training

    result = benchmark_training(options, config)
    print(json.dumps(result, indent=1) if options.json else as_table(result))
    if options.plot:
        draw_by_r(result, Path(options.plot))


def _pipeline(arguments: Sequence[str]) -> None:
    options, config = flags.parse(flags.PipelineBenchmarkOptions, "pipeline", arguments, __doc__)
    from megatron_ponder.benchmark.pipeline import as_text, benchmark_pipeline, draw_measured

    result, measured = benchmark_pipeline(options, config)
    print(json.dumps(result, indent=1) if options.json else as_text(result))
    if options.timeline:
        draw_measured(measured, result, Path(options.timeline))


def _generate(arguments: Sequence[str]) -> None:
    options, config = flags.parse(flags.GenerateBenchmarkOptions, "generate", arguments, __doc__)
    from megatron_ponder.benchmark.generate import as_text, benchmark_generation

    result = benchmark_generation(options, config)
    print(json.dumps(result, indent=1) if options.json else as_text(result))


def _preprocess(arguments: Sequence[str]) -> None:
    options = tyro.cli(flags.PreprocessBenchmarkOptions, description=__doc__, args=arguments)
    from megatron_ponder.benchmark.preprocess import as_text, benchmark_preprocessing

    result = benchmark_preprocessing(options)
    print(json.dumps(result, indent=1) if options.json else as_text(result))


if __name__ == "__main__":
    sys.exit(main())
