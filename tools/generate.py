"""Continues texts with a trained model.

    python tools/generate.py --load runs/ponder --prompt "def main(" --temperature 0.8 --top-k 40
    python tools/generate.py --load runs/ponder --prompt "The " --prompt "A " --temperature 0
    python tools/generate.py --load runs/ponder --prompt-file prompts.jsonl --json > texts.json
    torchrun --nproc-per-node 4 tools/generate.py --load runs/ponder --prompt "The "

A single text is printed as it grows; several are continued together. Keys and values of all slots,
thoughts included, are kept between tokens; --no-use-cache computes the whole training forward for
every token instead. Speed is told on stderr. Under torchrun all ranks share each layer's weights.
docs/generate.md says what exactly is computed.
"""

import json
import sys
from collections.abc import Sequence

from megatron_ponder.config.parse import parse_options
from megatron_ponder.errors import exit_on_user_error
from megatron_ponder.inference.options import GenerateOptions


def parse(argv: Sequence[str] | None) -> GenerateOptions:
    """The flags."""
    return parse_options(GenerateOptions, argv, prog="tools/generate.py", description=__doc__)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags, generate, print."""
    options = parse(argv)
    from megatron_ponder import log

    log.configure(sys.stderr)  # before the imports below, some of which warn
    from megatron_ponder.inference.generation import run
    from megatron_ponder.runtime.distributed import is_rank_zero

    def write(piece: str) -> None:
        if is_rank_zero() and not options.json:
            sys.stdout.write(piece)
            sys.stdout.flush()

    try:
        result = run(options, write)
    except KeyboardInterrupt:
        write("\n")
        return 130  # as a shell says that a signal ended it
    if not is_rank_zero():
        return 0
    if options.json:
        print(json.dumps(result, indent=1))
    print(
        f"{result['num_new_tokens']} tokens in {result['elapsed_s']:.2f} s, "
        f"{result['tokens_per_s']:.1f} tokens/s",
        file=sys.stderr,
    )
    if result["num_longer_texts"]:
        print(
            f"{result['num_longer_texts']} of the texts outgrew the {result['seq_length']} tokens "
            "that the model was trained on; what lies behind is not what it has learnt.",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
