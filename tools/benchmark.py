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
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.commands import COMMANDS, run_command
from megatron_ponder import log
from megatron_ponder.config.help_texts import HELP
from megatron_ponder.config.parse import parse_args
from megatron_ponder.errors import ConfigError, exit_on_user_error


@exit_on_user_error
def main() -> None:
    """Parse flags, measure, print."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        name, arguments = "train", ["--help"]
    elif name not in COMMANDS:
        raise ConfigError(f"{name}: the first argument must be one of {', '.join(COMMANDS)}.")
    command, prog = COMMANDS[name], f"tools/benchmark.py {name}"
    options, settings = tyro.cli(
        command.options,
        prog=prog,
        description=__doc__,
        args=arguments,
        return_unknown_args=True,
        registry=HELP,
    )
    if settings and not command.takes_settings:
        raise ConfigError(f"{' '.join(settings)}: not among the flags of {prog}.")
    config = parse_args(settings, prog=prog)
    log.configure(sys.stderr)  # before imports that warn
    result, text = run_command(name, options, config)
    print(json.dumps(result, indent=1) if options.json else text)


if __name__ == "__main__":
    sys.exit(main())
