"""Reports what this machine has, what a run would use on it, and why.

    python tools/doctor.py
    python tools/doctor.py --bf16 --fp8-format hybrid --json
    python tools/doctor.py --config examples/llama/ponderlm2-1.4b.yaml

Accepts every setting of megatron_ponder.pretrain (only those that choose backends matter) and the
flag below. Needs no data. The exit code is 2 if a flag is invalid, otherwise 0: if a run would be
refused here, the report says why.
"""

import json
import sys

import tyro

from megatron_ponder.config.help_texts import HELP
from megatron_ponder.config.parse import parse_args
from megatron_ponder.errors import exit_on_user_error


@exit_on_user_error
def main() -> None:
    """Parse flags, inspect the machine, print the report."""
    from megatron_ponder import log

    log.configure()  # before the imports below, some of which warn
    from megatron_ponder.runtime.capabilities import find_capabilities
    from megatron_ponder.runtime.diagnosis import DoctorOptions, as_text, diagnose

    options, settings = tyro.cli(
        DoctorOptions,
        prog="tools/doctor.py",
        description=__doc__,
        return_unknown_args=True,
        registry=HELP,
    )
    report = diagnose(parse_args(settings, prog="tools/doctor.py"), find_capabilities())
    print(json.dumps(report, indent=1) if options.json else as_text(report))


if __name__ == "__main__":
    sys.exit(main())
