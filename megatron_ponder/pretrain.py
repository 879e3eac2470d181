"""Pretrains a model: the entry point.

    torchrun --nproc-per-node 2 -m megatron_ponder.pretrain --config examples/X.yaml [--flags]
    python -m megatron_ponder.pretrain --help

Without torchrun it is a single process. torch is imported after the flags are parsed, so that
`--help` and a misspelt flag answer at once. docs/train.md is the manual.
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
"""How long a rank that cannot go on waits for rank 0 to say why: rank 0 mostly meets the same
error, and torchrun ends all ranks when it exits."""


@exit_on_user_error
def main(argv: Sequence[str] | None = None) -> None:
    """Parse flags and train. A mistake of the user is told once, not once per rank.

    Args:
        argv: flags; None for those of the command line.
    """
    try:
        config = _parse(sys.argv[1:] if argv is None else argv)
        _set_environment(config)
        log.configure()
        from megatron_ponder.train.run import run

        run(config)
    except (PonderError, SystemExit) as error:
        if isinstance(error, PonderError):
            _tell_torchrun(error)
        if _rank() != 0:
            time.sleep(GRACE_S)
        raise


def _parse(argv: Sequence[str]) -> RunConfig:
    """The config, with help and complaints printed by rank 0 only."""
    with contextlib.ExitStack() as stack:
        if _rank() != 0:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        return parse_args(argv, prog="python -m megatron_ponder.pretrain")


def _set_environment(config: RunConfig) -> None:
    """What CUDA reads once, when it starts; a variable that is set stays as it is.

    megatron-core's tensor-parallel layers start a communication and then the product that is to
    hide it, and rely on their order on the device, which one queue keeps.
    """
    if config.parallel.tensor_model_parallel_size > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _tell_torchrun(error: PonderError) -> None:
    """Put the message where torchrun looks for the reason when it reports a failed rank."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        text = f"{type(error).__name__}: {error}"
        details = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with open(path, "w") as file:
            json.dump({"message": {"message": text, "extraInfo": details}}, file)


def _rank() -> int:
    """Global rank as torchrun sets it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


if __name__ == "__main__":
    sys.exit(main())
