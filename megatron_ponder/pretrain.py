"""Entry point of pretraining.

    torchrun --nproc-per-node 2 -m megatron_ponder.pretrain --config examples/X.yaml [--flags]
    python -m megatron_ponder.pretrain --help

Without torchrun, training runs in a single process. torch is imported after the flags are parsed,
so `--help` and the error for a misspelt flag appear at once. docs/train.md is the manual.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence

from megatron_ponder import log
from megatron_ponder.config.parse import parse_args
from megatron_ponder.config.schema import RunConfig
from megatron_ponder.errors import PonderError, exit_on_user_error

GRACE_S = 5.0
"""Grace period before a failing non-zero rank exits, so that rank 0 can report the error first.
Rank 0 usually fails with the same error, and torchrun stops all ranks as soon as one exits."""


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and train. A user error is reported once, not once per rank.

    Args:
        argv: flags; None: those of the command line.
    """
    try:
        config = _parse(sys.argv[1:] if argv is None else argv)
        _set_environment(config)
        log.configure()
        from megatron_ponder.train.run import run

        run(config)
    except (PonderError, SystemExit) as error:
        if isinstance(error, PonderError):
            _report_to_torchrun(error)
        if _rank() != 0:
            time.sleep(GRACE_S)
        raise


def _parse(argv: Sequence[str]) -> RunConfig:
    """Parse the config. Only rank 0 prints help and error messages."""
    with contextlib.ExitStack() as stack:
        if _rank() != 0:
            devnull = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(devnull))
            stack.enter_context(contextlib.redirect_stderr(devnull))
        return parse_args(argv, prog="python -m megatron_ponder.pretrain")


def _set_environment(config: RunConfig) -> None:
    """Set environment variables that CUDA reads at start-up, unless they are already set.

    megatron-core's tensor-parallel layers launch a communication, then the matmul that overlaps
    with it. They need the device to start the two in this order. A single hardware queue
    guarantees it.
    """
    if config.parallel.tensor_model_parallel_size > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _report_to_torchrun(error: PonderError) -> None:
    """Write the message to the file that torchrun reads when it reports a failed rank."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        text = f"{type(error).__name__}: {error}"
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with open(path, "w") as file:
            json.dump({"message": {"message": text, "extraInfo": details}}, file)


def _rank() -> int:
    """Global rank, as set by torchrun; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


if __name__ == "__main__":
    sys.exit(main())
