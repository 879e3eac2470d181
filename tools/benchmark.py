"""Measures what a run costs, each command beside something to compare it with.

    python tools/benchmark.py train --json --preset pythia-160m --bf16 --micro-batch-size 8
    python tools/benchmark.py train --config X.yaml --roofline --profile trace.json.gz
    python tools/benchmark.py kernels --preset llama-410m --bf16
    python tools/benchmark.py checkpoint --preset llama-410m --folder /scratch
    python tools/benchmark.py pipeline --json --config X.yaml --pipeline-model-parallel-size 2
    python tools/benchmark.py curves --plot curves.png --record curves.json
    python tools/benchmark.py generate --json --preset pythia-70m --prompt-tokens 1024
    python tools/benchmark.py preprocess --json --input corpus.jsonl.zst

`train` (beside the method on stock transformers layers), `kernels` (beside eager chains),
`checkpoint` (stall, bytes, load), `pipeline` (beside the simulator, on a CPU core per rank),
`curves` (over K, R, length, size, batch, method and ranks, beside what is predicted; without
settings of a small model) and `generate` (with a cache beside without) take the settings of
pretraining, and the flags below.
"""

import json
import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.commands import COMMANDS
from megatron_ponder import log
from megatron_ponder.config.help_texts import HELP
from megatron_ponder.config.parse import parse_args
from megatron_ponder.errors import ConfigError, exit_on_user_error


@exit_on_user_error
def main() -> None:
    """Parse flags, measure, print."""
    command, *arguments = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        command, arguments = "train", ["--help"]
    elif command not in COMMANDS:
        raise ConfigError(f"{command}: what to measure must come first: {', '.join(COMMANDS)}.")
    chosen, prog = COMMANDS[command], f"tools/benchmark.py {command}"
    options, settings = tyro.cli(
        chosen.options,
        prog=prog,
        description=__doc__,
        args=arguments,
        return_unknown_args=True,
        registry=HELP,
    )
    if settings and not chosen.takes_settings:
        raise ConfigError(f"{' '.join(settings)}: not among the flags of {prog}.")
    config = [parse_args(settings, prog=prog)] if chosen.takes_settings else []
    log.configure(sys.stderr)  # before imports that warn
    result, text = chosen.measure(options, *config)
    print(json.dumps(result, indent=1) if options.json else text)


if __name__ == "__main__":
    sys.exit(main())
