r"""Builds the sample and shuffle indexes of a training run before it starts.

    python tools/prepare_index.py --world-size 1024 --config run.yaml \
        --data-path data/corpus_text_document

Accepts every flag of megatron_ponder.pretrain: give those of the run. The run then finds its
indexes in the cache (--data-cache-path) and needs no write access to it.
"""

import sys
from collections.abc import Sequence

from megatron_ponder.config.parse import parse_options_and_settings
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.data.options import PrepareIndexOptions
from megatron_ponder.errors import exit_on_user_error


def parse(argv: Sequence[str] | None) -> tuple[PrepareIndexOptions, RunConfig]:
    """The flags."""
    return parse_options_and_settings(
        PrepareIndexOptions, argv, prog="tools/prepare_index.py", description=__doc__
    )


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags and build."""
    options, config = parse(argv)
    from megatron_ponder import log

    log.configure()  # before the import below, which warns
    from megatron_ponder.data.index_preparation import prepare_index

    for name, num_sequences in prepare_index(options, config).items():
        print(f"{name}: {num_sequences} sequences of {config.data.seq_length} tokens")


if __name__ == "__main__":
    sys.exit(main())
