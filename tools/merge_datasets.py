r"""Merges indexed datasets into one, without tokenizing again.

    python tools/merge_datasets.py --input data/a_text_document data/b_text_document \
        --output-prefix data/all_text_document

All datasets must have the same tokenizer. To sample from several datasets by weight you need not
merge them: --data-path of megatron_ponder.pretrain takes several.
"""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_ponder.config.parse import parse_options
from megatron_ponder.errors import exit_on_user_error

if TYPE_CHECKING:
    from megatron_ponder.data.merging import MergeConfig


def parse(argv: Sequence[str] | None) -> "MergeConfig":
    """The flags."""
    from megatron_ponder.data.merging import MergeConfig

    return parse_options(MergeConfig, argv, prog="tools/merge_datasets.py", description=__doc__)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags and merge."""
    from megatron_ponder import log
    from megatron_ponder.data.merging import merge_datasets

    log.configure()
    config = parse(argv)
    entry = merge_datasets(config)
    print(f"{config.output_prefix}: {entry['documents']} documents, {entry['tokens']} tokens")


if __name__ == "__main__":
    sys.exit(main())
