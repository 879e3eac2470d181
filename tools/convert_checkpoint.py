r"""Converts between Hugging Face folders and checkpoints of this package. Needs no GPU.

    python tools/convert_checkpoint.py import --hf-path pythia-410m --save runs/start
    python tools/convert_checkpoint.py import --hf-path llama --save runs/start \
        --method ponderlm2 --num-latent-thoughts 1
    python tools/convert_checkpoint.py export --load runs/ponder --hf-path exported --dtype bf16

Both hold about one weight in memory at a time, and then compare source and result on the same ids
(which takes the whole model; --no-verify leaves it out). The result appears under its name only
when it is complete. docs/convert.md says what is converted, and what is refused.
"""

import os
import sys
from collections.abc import Sequence

from megatron_ponder.config.parse import parse_options
from megatron_ponder.convert.options import ExportOptions, ImportOptions
from megatron_ponder.errors import ConfigError, exit_on_user_error


def parse(argv: Sequence[str]) -> ImportOptions | ExportOptions:
    """The flags of the command that comes first."""
    command, *arguments = argv
    prog = f"tools/convert_checkpoint.py {command}"
    if command == "import":
        return parse_options(ImportOptions, arguments, prog=prog, description=__doc__)
    if command == "export":
        return parse_options(ExportOptions, arguments, prog=prog, description=__doc__)
    raise ConfigError(f"{command}: what to do must come first: import or export.")


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags and convert."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: convert_checkpoint.py {{import,export}} [flags] (or --help)\n\n{__doc__}")
        return
    options = parse(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a conversion takes one process: start it without torchrun.")
    from megatron_ponder import log

    log.configure()  # before the imports below, some of which warn
    if isinstance(options, ImportOptions):
        from megatron_ponder.convert.importing import import_checkpoint

        import_checkpoint(options)
    else:
        from megatron_ponder.convert.exporting import export_checkpoint

        export_checkpoint(options)


if __name__ == "__main__":
    sys.exit(main())
