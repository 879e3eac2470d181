"""Reports what this machine has, what a run would use on it, and why.

    python tools/doctor.py
    python tools/doctor.py --bf16 --fp8-format hybrid --json
    python tools/doctor.py --config examples/llama/ponderlm2-1.4b.yaml

Accepts every setting of megatron_ponder.pretrain (only those that choose backends matter) and the
flag below. Needs no data. The exit code is 2 if a flag is invalid or a package is missing, does not
fit or cannot be loaded; otherwise 0: if a run would be refused here, the report says why.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works before `make install`

from megatron_ponder.errors import exit_on_user_error


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags, inspect the machine, print the report."""
    # Imported here, so that what is missing is reported without a traceback.
    from megatron_ponder import log
    from megatron_ponder.config.parse import parse_options_and_settings

    log.configure()  # before the imports below, some of which warn
    from megatron_ponder.runtime.capabilities import find_capabilities
    from megatron_ponder.runtime.diagnosis import DoctorOptions, as_text, diagnose

    options, config = parse_options_and_settings(
        DoctorOptions, argv, prog="tools/doctor.py", description=__doc__
    )
    report = diagnose(config, find_capabilities())
    print(json.dumps(report, indent=1) if options.json else as_text(report))
    return 2 if report["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
