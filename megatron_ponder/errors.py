"""The exceptions for user errors, and the decorator that turns them into exit codes.

Every user error (flags, data, checkpoints) is raised as a `PonderError`. Its message says what was
given, what is required and what to change. Bugs raise ordinary exceptions with a traceback. Every
command wraps its `main` in `exit_on_user_error`.
"""

import functools
import os
import sys
from collections.abc import Callable

from megatron_ponder.installation import LOADING_ERRORS, problems

USER_ERROR_EXIT_CODE = 2
BROKEN_PIPE_EXIT_CODE = 141


class PonderError(Exception):
    """Base of every error whose message is written for the user."""


class ConfigError(PonderError):
    """An invalid flag, YAML key or preset, or an invalid combination of them."""


class BackendError(PonderError):
    """A backend, device or library that was requested by name and is not usable here."""


class DataError(PonderError):
    """A corpus, tokenizer or indexed dataset that is missing, damaged or does not fit the model."""


class CheckpointError(PonderError):
    """A checkpoint that is missing, damaged or does not fit the model or the run."""


class ConversionError(PonderError):
    """Weights or a configuration that cannot be converted to or from Hugging Face."""


class TrainingError(PonderError):
    """A run that cannot continue, because its loss or gradient is no longer finite."""


def exit_on_user_error(main: Callable[..., int | None]) -> Callable[..., int]:
    """Make `main` return an exit code, and report user errors without a traceback.

    A `PonderError`, or an OSError about a file (no permission, disk full), prints its message on
    stderr and returns 2. So does an import that fails because of what is installed. A broken pipe
    prints nothing and returns the exit code that a shell gives for it. Any other exception is a bug
    of ours and passes through with its traceback.
    """

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> int:
        try:
            return main(*args, **kwargs) or 0
        except PonderError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        except BrokenPipeError:
            # Redirect stdout, so that Python's flush at exit does not raise the error again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE_EXIT_CODE
        except LOADING_ERRORS as error:
            if isinstance(error, OSError) and error.filename is not None:
                print(f"{error.filename}: {error.strerror}", file=sys.stderr, flush=True)
            elif found := [*problems()]:
                print(f"{error}\nThe installation is broken:", file=sys.stderr)
                print("\n".join(f"  - {problem}" for problem in found), file=sys.stderr, flush=True)
            else:
                raise
        return USER_ERROR_EXIT_CODE

    return wrapped
