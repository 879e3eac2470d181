"""Scores text with a trained model and prints one JSON object.

    python tools/evaluate.py --load runs/ponder --data-path data/held_out_text_document
    python tools/evaluate.py --load runs/ponder --text-file book.txt --num-jacobi-iterations 1 3 6
    python tools/evaluate.py --load runs/ponder --text-file book.txt --stride 512
    torchrun --nproc-per-node 4 tools/evaluate.py --load runs/ponder --text-file docs/
    python tools/evaluate.py --load runs/ponder --token-ids ids.npy --dump-logits logits.npy

`loss` is the mean cross entropy per token in nats, `perplexity` its exponential, `bits_per_byte`
the same information per byte of text, which models with different tokenizers can be compared by.
Every token is predicted once, from what stands before it in a window of --seq-length tokens;
windows do not overlap unless --stride says so. Several R give their figures as a list, `by_r`.
Under torchrun all ranks share each layer's weights. docs/generate.md says more.
"""

import json
import sys
from collections.abc import Sequence

from megatron_ponder.config.parse import parse_options
from megatron_ponder.errors import exit_on_user_error
from megatron_ponder.inference.options import EvaluateOptions


def parse(argv: Sequence[str] | None) -> EvaluateOptions:
    """The flags."""
    return parse_options(EvaluateOptions, argv, prog="tools/evaluate.py", description=__doc__)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, evaluate, print."""
    options = parse(argv)
    from megatron_ponder import log

    log.configure(sys.stderr)  # before the imports below, some of which warn
    from megatron_ponder.inference.evaluation import evaluate
    from megatron_ponder.runtime.distributed import is_rank_zero

    result = evaluate(options)
    if is_rank_zero():
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    sys.exit(main())
