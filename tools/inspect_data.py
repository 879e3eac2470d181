r"""Prints statistics of an indexed dataset, shows documents, and verifies the files.

    python tools/inspect_data.py --data-path data/corpus_text_document
    python tools/inspect_data.py --data-path data/corpus_text_document --verify
    python tools/inspect_data.py --data-path data/corpus_text_document --document 17 \
        --tokenizer-model tokenizer.model --histogram lengths.png

If the dataset is missing or damaged, the exit code is 2 and the message says why.
"""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_ponder.config.parse import parse_options
from megatron_ponder.errors import exit_on_user_error

if TYPE_CHECKING:
    from megatron_ponder.data.inspection import InspectConfig


def parse(argv: Sequence[str] | None) -> "InspectConfig":
    """The flags."""
    from megatron_ponder.data.inspection import InspectConfig

    return parse_options(InspectConfig, argv, prog="tools/inspect_data.py", description=__doc__)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags, inspect the dataset, print."""
    from megatron_ponder import log
    from megatron_ponder.data.inspection import inspect_dataset

    log.configure(sys.stderr)
    config = parse(argv)
    result = inspect_dataset(config)
    if config.json:
        print(json.dumps(result, indent=1))
        return
    document = result.pop("document", None)
    for name, value in result.items():
        if isinstance(value, dict):
            value = ", ".join(
                f"{key} {each:g}" if isinstance(each, float) else f"{key} {each}"
                for key, each in value.items()
            )
        print(f"{name.replace('_', ' ')}: {value}")
    if document is not None:
        end = "with" if document["is_ended"] else "without"
        print(f"document {document['number']}: {document['tokens']} tokens, {end} an end id\n")
        print(document["text"])


if __name__ == "__main__":
    sys.exit(main())
