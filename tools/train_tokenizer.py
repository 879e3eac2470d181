"""Trains a SentencePiece tokenizer on a corpus.

    python tools/train_tokenizer.py --input corpus.jsonl --output tokenizer.model --vocab-size 32000

The tokenizer is lossless (it preserves white space and all characters) and has an end-of-sequence
piece, which ends documents in training.
"""

import sys

import tyro

from megatron_ponder.config.help_texts import HELP
from megatron_ponder.errors import exit_on_user_error


@exit_on_user_error
def main() -> None:
    """Parse flags and train."""
    from megatron_ponder import log

    log.configure()
    from megatron_ponder.data.sentencepiece_training import (
        TokenizerTrainingConfig,
        train_sentencepiece,
    )

    config = tyro.cli(TokenizerTrainingConfig, description=__doc__, registry=HELP)
    train_sentencepiece(config)
    if config.hf_output:
        print(f"{config.hf_output}: the same tokenizer for Hugging Face")
    print(f"{config.output}: {config.vocab_size} pieces")


if __name__ == "__main__":
    sys.exit(main())
