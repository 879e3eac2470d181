r"""Merges indexed datasets into one, without tokenizing again.

    python tools/merge_datasets.py --input data/a_text_document data/b_text_document \
        --output-prefix data/all_text_document

All datasets must have the same tokenizer. To sample from several datasets by weight you need not
merge them: --data-path of megatron_ponder.pretrain takes several.
"""

import sys

import tyro

from megatron_ponder.config.help_texts import HELP
from megatron_ponder.errors import exit_on_user_error


@exit_on_user_error
def main() -> None:
    """Parse flags and merge."""
    from megatron_ponder import log
    from megatron_ponder.data.merging import MergeConfig, merge_datasets

    log.configure()
    config = tyro.cli(MergeConfig, description=__doc__, registry=HELP)
    entry = merge_datasets(config)
    print(f"{config.output_prefix}: {entry['documents']} documents, {entry['tokens']} tokens")


if __name__ == "__main__":
    sys.exit(main())
