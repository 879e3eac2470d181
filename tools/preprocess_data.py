r"""Tokenizes a corpus into an indexed dataset for training.

    python tools/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \
        --tokenizer-model tokenizer.model --append-eod --workers 8

Writes data/corpus_text_document.bin and .idx, which training takes as
--data-path data/corpus_text_document, and data/corpus.manifest.json. Every document read is either
written or rejected with file, line and reason; more than --max-rejected stop the run. To resume an
interrupted run, repeat the command.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_ponder.config.parse import parse_options
from megatron_ponder.errors import exit_on_user_error

if TYPE_CHECKING:
    from megatron_ponder.data.preprocess import PreprocessConfig


def parse(argv: Sequence[str] | None) -> "PreprocessConfig":
    """The flags."""
    from megatron_ponder.data.preprocess import PreprocessConfig

    return parse_options(
        PreprocessConfig, argv, prog="tools/preprocess_data.py", description=__doc__
    )


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags and preprocess."""
    from megatron_ponder import log

    log.configure()  # before the imports below, some of which warn
    from megatron_ponder.data.preprocess import preprocess

    config = parse(argv)
    summary = preprocess(config)
    rejected = ", ".join(f"{count} {kind}" for kind, count in sorted(summary.rejected.items()))
    print(
        f"{summary.num_read} documents read = {summary.num_written} written "
        f"+ {summary.num_rejected} rejected{f' ({rejected})' if rejected else ''}"
    )
    for name, num_tokens in summary.num_tokens.items():
        prefix = f"{config.output_prefix}_{name}"
        print(f"{prefix}: {num_tokens} tokens from {summary.num_text_bytes} bytes of input")


if __name__ == "__main__":
    sys.exit(main())
