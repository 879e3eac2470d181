"""Continues a text with a trained model.

    python tools/generate.py --load runs/llama --prompt "def main(" --temperature 0.8 --top-k 40
    python tools/generate.py --load runs/llama --prompt "The " --temperature 0 --max-new-tokens 20

Prints the prompt and its continuation. Each new token recomputes the training path over all tokens
before it (thoughts included), without a cache: right, but slow; for looking at a model, not for
serving one. Under torchrun all ranks share each layer's weights.
"""

import sys

import tyro

from megatron_ponder.errors import exit_on_user_error
from megatron_ponder.inference.options import GenerateOptions


@exit_on_user_error
def main() -> None:
    """Parse flags, generate, print."""
    options = tyro.cli(GenerateOptions, description=__doc__, config=(tyro.conf.OmitArgPrefixes,))
    from megatron_ponder import log

    log.configure()  # before the imports below, some of which warn
    from megatron_ponder.inference.sampling import generate_text
    from megatron_ponder.runtime.distributed import is_rank_zero

    text = generate_text(options)
    if is_rank_zero():
        print(text)


if __name__ == "__main__":
    sys.exit(main())
