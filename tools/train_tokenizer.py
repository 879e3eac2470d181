"""Trains a SentencePiece tokenizer on a corpus.

    python tools/train_tokenizer.py --input corpus.jsonl --output tokenizer.model --vocab-size 32000

The tokenizer is lossless (it preserves white space and all characters) and has an end-of-sequence
piece, which ends documents in training.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_ponder.config.parse import parse_options
from megatron_ponder.errors import exit_on_user_error

if TYPE_CHECKING:
    from megatron_ponder.data.sentencepiece_training import TokenizerTrainingConfig


def parse(argv: Sequence[str] | None) -> "TokenizerTrainingConfig":
    """The flags."""
    from megatron_ponder.data.sentencepiece_training import TokenizerTrainingConfig

    return parse_options(
        TokenizerTrainingConfig, argv, prog="tools/train_tokenizer.py", description=__doc__
    )


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags and train."""
    from megatron_ponder import log

    log.configure()
    from megatron_ponder.data.sentencepiece_training import train_sentencepiece

    config = parse(argv)
    train_sentencepiece(config)
    if config.hf_output:
        print(f"{config.hf_output}: the same tokenizer for Hugging Face")
    print(f"{config.output}: {config.vocab_size} pieces")


if __name__ == "__main__":
    sys.exit(main())
