"""Measures everything on this machine's GPU and writes a report.

Speed against the targets, passes against their floor, kernels, memory, checkpoints, tests.

    python tools/gpu_report.py --budget-minutes 60
    python tools/gpu_report.py --dry-run
    python tools/gpu_report.py --allow-cpu --tiny --folder /tmp/report

Parts run in order of importance, each in a process of its own; their results are kept, and the same
command again goes on with those that are missing. Exit code 1: some have no result yet.
"""

import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # benchmarks/ is not installed

from benchmarks.gpu_report import GpuReportOptions, run_report
from megatron_ponder import log
from megatron_ponder.config.help_texts import HELP
from megatron_ponder.errors import exit_on_user_error


@exit_on_user_error
def main() -> int:
    """Parse flags, run, write."""
    options = tyro.cli(
        GpuReportOptions, prog="tools/gpu_report.py", description=__doc__, registry=HELP
    )
    log.configure()
    return 0 if run_report(options) else 1


if __name__ == "__main__":
    sys.exit(main())
