"""Measures what a run costs, each command beside something to compare it with.

    python tools/benchmark.py train --json --preset pythia-160m --bf16 --micro-batch-size 8
    python tools/benchmark.py train --config X.yaml --roofline --profile trace.json.gz
    python tools/benchmark.py kernels --preset llama-410m --bf16
    python tools/benchmark.py checkpoint --preset llama-410m --folder /scratch
    python tools/benchmark.py curves --plot curves.png --record curves.json
    python tools/benchmark.py generate --json --preset pythia-70m --prompt-tokens 1024
    python tools/benchmark.py preprocess --json --input corpus.jsonl.zst

`train` compares with the method on stock transformers layers, `kernels` with eager operations,
`generate` with generation without a cache, `preprocess` with a plain loop. `checkpoint` measures
the stall of a save, bytes and loading. `curves` varies K, R, length, size, batch, method and ranks
one at a time and compares with predictions; without settings it uses a small model. All but
`preprocess` take the settings of pretraining, and the flags below.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.commands import COMMANDS, BenchmarkOptions, run_command
from megatron_ponder import log
from megatron_ponder.config.parse import parse_options, parse_options_and_settings
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import ConfigError, exit_on_user_error


def parse(argv: Sequence[str] | None) -> tuple[str, BenchmarkOptions, RunConfig]:
    """Name of the command, its flags, and settings of the run that it measures."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        name, arguments = "train", ["--help"]
    elif name not in COMMANDS:
        raise ConfigError(f"{name}: the first argument must be one of {', '.join(COMMANDS)}.")
    command, prog = COMMANDS[name], f"tools/benchmark.py {name}"
    if not command.takes_settings:
        options = parse_options(command.options, arguments, prog=prog, description=__doc__)
        return name, options, RunConfig()
    return name, *parse_options_and_settings(
        command.options, arguments, prog=prog, description=__doc__
    )


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, measure, print."""
    name, options, config = parse(argv)
    log.configure(sys.stderr)  # before imports that warn
    result, text = run_command(name, options, config)
    print(json.dumps(result, indent=1) if options.json else text)


if __name__ == "__main__":
    sys.exit(main())
