"""Pretrains small language models on this machine and compares them: `make quickstart`.

    python examples/quickstart/run.py [--folder runs/quickstart] [--methods all] [--fresh]

Needs no network and no GPU. Makes a corpus from the Python standard library, a tokenizer and
indexed datasets from the corpus, trains each method (two, or with --methods all five) on the same
batches through torchrun on 2 processes, evaluates all on held-out files, exports PonderLM-2 to
Hugging Face and reads it with transformers alone, and shows loss curves, a table and samples. Every
command it runs is kept in the log of its step. It can be interrupted at any time: the same command
goes on, and skips what is done, also what was done for other --methods.
The settings of the models are in pretrain.yaml beside this file.
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
    """Say what is missing before anything is imported."""
    missing = [name for name in NEEDED if not _is_installed(name)]
    if missing:
        print(
            f"{sys.executable} (Python {platform.python_version()}) lacks: {', '.join(missing)}.\n"
            "Run `make quickstart`, which installs everything into a virtual environment and uses "
            "that, or `make install` and then .venv/bin/python examples/quickstart/run.py.",
            file=sys.stderr,
        )
        sys.exit(2)


def _is_installed(name: str) -> bool:
    """Whether a module can be found; a dotted one also lacks where its parent does."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def main(argv: Sequence[str] | None = None) -> int:
    """Parse flags and run what is not done yet; the exit code.

    Args:
        argv: flags; None for those of the command line.
    """
    # Here, because all of it needs what check_environment looks for.
    import tyro
    from steps import Options, Quickstart
    from workflow import Workflow, exclusive

    from megatron_ponder.errors import exit_on_user_error

    @exit_on_user_error
    def run(options: Options) -> None:
        with exclusive(options.folder) as lock:
            quickstart = Quickstart(options, lock)
            workflow = Workflow(options.folder, quickstart.steps())
            if options.fresh:
                workflow.start_afresh()
            workflow.print_plan()
            workflow.run()
            print(f"\n{quickstart.report()}", flush=True)

    options = tyro.cli(Options, description=__doc__, args=argv)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return run(options)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on from here.", file=sys.stderr)
        return EXIT_INTERRUPTED


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Treat SIGTERM as Ctrl-C: children are ended in good order."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    check_environment()
    sys.exit(main())
