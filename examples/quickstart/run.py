"""Pretrains small language models on this machine and compares them: `make quickstart`.

    python examples/quickstart/run.py [--folder runs/quickstart] [--methods all] [--fresh]

Needs no network and no GPU. Builds a corpus from the Python standard library, trains a tokenizer
and writes indexed datasets. Trains each method (by default two; --methods all trains five) on the
same batches with torchrun on 2 processes, and evaluates each on held-out files. Exports PonderLM-2
to Hugging Face and evaluates the export with transformers alone. Reports loss curves, a table and
samples. The log of each step records the commands it ran. To resume after an interruption, repeat
the command; finished steps are skipped, including those of other --methods. The settings of the
models are in pretrain.yaml in this folder.
"""

import importlib.util
import platform
import signal
import sys
from collections.abc import Sequence
from types import FrameType

NEEDED = (
    *("megatron_ponder", "torch", "megatron.core", "sentencepiece", "tokenizers"),
    *("transformers", "tyro", "yaml", "tqdm", "matplotlib", "numpy"),
)
EXIT_INTERRUPTED = 130


def check_environment() -> None:
    """Report missing packages before anything is imported."""
    missing = [name for name in NEEDED if not _is_installed(name)]
    if missing:
        print(
            f"{sys.executable} (Python {platform.python_version()}) lacks: {', '.join(missing)}.\n"
            "Run `make quickstart`, which installs everything into a virtual environment and uses "
            "it; or `make install`, then .venv/bin/python examples/quickstart/run.py.",
            file=sys.stderr,
        )
        sys.exit(2)


def _is_installed(name: str) -> bool:
    """Whether a module, or the parent of a dotted one, can be found."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags, run all unfinished steps, and return the exit code.

    Args:
        argv: flags; None: those of the command line.
    """
    # Imported here because they need the packages that check_environment looks for.
    from steps import Options, Quickstart
    from workflow import Workflow, exclusive

    from megatron_ponder.config.parse import parse_options
    from megatron_ponder.errors import exit_on_user_error

    @exit_on_user_error
    def run() -> None:
        options = parse_options(Options, argv, prog="run.py", description=__doc__)
        with exclusive(options.folder) as lock:
            quickstart = Quickstart(options, lock)
            workflow = Workflow(options.folder, quickstart.steps())
            if options.fresh:
                workflow.start_afresh()
            workflow.print_plan()
            workflow.run()
            print(f"\n{quickstart.report()}", flush=True)

    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return run()
    except KeyboardInterrupt:
        print("\nInterrupted. Repeat the same command to resume.", file=sys.stderr)
        return EXIT_INTERRUPTED


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Treat SIGTERM like Ctrl-C, so that child processes are terminated."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    check_environment()
    sys.exit(main())
