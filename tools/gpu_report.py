"""Measures everything on this machine's GPU and writes a report.

Speed against the targets, passes against their floor, kernels, memory, checkpoints, tests.

    python tools/gpu_report.py --budget-minutes 60
    python tools/gpu_report.py --dry-run
    python tools/gpu_report.py --allow-cpu --tiny --folder /tmp/report

Parts run in order of importance, each in a process of its own; their results are kept, and the same
command again goes on with those that are missing. Exit code 1: some have no result yet.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.gpu_report import GpuReportOptions, run_report
from megatron_ponder import log
from megatron_ponder.config.parse import parse_options
from megatron_ponder.errors import exit_on_user_error


def parse(argv: Sequence[str] | None) -> GpuReportOptions:
    """The flags."""
    return parse_options(GpuReportOptions, argv, prog="tools/gpu_report.py", description=__doc__)


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags, run, write."""
    options = parse(argv)
    log.configure()
    return 0 if run_report(options) else 1


if __name__ == "__main__":
    sys.exit(main())
