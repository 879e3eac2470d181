"""The exceptions a user can meet, and the one place that turns them into exit codes.

Every mistake of a user (flags, data, checkpoints) is raised as a `PonderError` whose message says
what was given, what is required and what to change. Programming errors stay ordinary exceptions
with a traceback. Command lines wrap their `main` in `exit_on_user_error`.
"""

import functools
import os
import sys
from collections.abc import Callable

USER_ERROR_EXIT_CODE = 2
BROKEN_PIPE_EXIT_CODE = 141


class PonderError(Exception):
    """Base of every error whose message is written for the user."""


class ConfigError(PonderError):
    """A flag, a YAML key, a preset, or a combination of them that cannot work."""


class BackendError(PonderError):
    """A backend, device or library that was asked for by name and is not usable here."""


class DataError(PonderError):
    """A corpus, tokenizer or indexed dataset that is missing, damaged or does not fit the model."""


class CheckpointError(PonderError):
    """A checkpoint that is missing, damaged or does not fit the model or the run."""


class ConversionError(PonderError):
    """Weights or a configuration that cannot be converted to or from Hugging Face."""


class TrainingError(PonderError):
    """A run that cannot go on: its loss or gradient is no longer finite."""


def exit_on_user_error(main: Callable[..., int | None]) -> Callable[..., int]:
    """Make `main` return an exit code: 2 and the message on stderr for a `PonderError`.

    So does an OSError about a file: no permission, disk full. A reader of the output that goes
    away ends `main` quietly, with the exit code that a shell gives for it. Any other exception
    passes through with its traceback, because it is a bug of ours.
    """

    @functools.wraps(main)
    def wrapped(*args: object, **kwargs: object) -> int:
        try:
            return main(*args, **kwargs) or 0
        except PonderError as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        except BrokenPipeError:
            # Whoever read our output has seen enough. Python would complain once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return BROKEN_PIPE_EXIT_CODE
        except OSError as error:
            if error.filename is None:
                raise
            print(f"{error.filename}: {error.strerror}", file=sys.stderr, flush=True)
        return USER_ERROR_EXIT_CODE

    return wrapped
