"""Names of flags: what is unknown, and what was probably meant. Checked before tyro parses.

tyro would list every unknown word in one line, and take the `true` of `--bf16 true` for another
one. Values are tyro's business.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from megatron_ponder.config.foreign_flags import HINTS
from megatron_ponder.errors import ConfigError

_FLAG = re.compile(r"--[a-z][\w-]*")


def check_flags(argv: Sequence[str], kinds: Iterable[Any], prog: str) -> None:
    """Refuse flags that no field of some dataclasses stands for, and values of switches.

    A value never begins with two hyphens: tyro takes none that does.

    Args:
        argv: the command line.
        kinds: the dataclasses; fields that are dataclasses themselves stand for their fields.
        prog: name of the program, for the message.

    Raises:
        ConfigError: one line per problem, each with what to write instead.
    """
    if "-h" in argv or "--help" in argv:
        return
    fields = dict(_fields(kinds))
    problems = [*_switches_with_values(argv, fields), *_unknown(argv, fields, prog)]
    if problems:
        raise ConfigError("\n".join(problems))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for a name that is unknown, with a space before it; empty if there is none.

    Args:
        name: as given, with hyphens or underscores, with or without leading hyphens.
        known: the names that exist, spelt in the same way.
    """
    known = set(known)
    hint = HINTS.get(name.lstrip("-").replace("_", "-"), "")
    ours = {flag.lstrip("-").replace("-", "_") for flag in _FLAG.findall(hint)}
    if hint and ours <= {other.lstrip("-").replace("-", "_") for other in known} | {"config"}:
        return f" {hint[0].upper()}{hint[1:]}."
    close = difflib.get_close_matches(name, sorted(known), n=2)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _fields(kinds: Iterable[Any]) -> Iterator[tuple[str, bool]]:
    """Name of each flag, and whether it is a switch; a switch has two names."""
    for kind in kinds:
        for field in dataclasses.fields(kind):
            name = field.name.replace("_", "-")
            if dataclasses.is_dataclass(field.type):
                yield from _fields([field.type])
            else:
                yield f"--{name}", field.type is bool
                if field.type is bool:
                    yield f"--no-{name}", True


def _switches_with_values(argv: Sequence[str], fields: dict[str, bool]) -> Iterator[str]:
    for word, following in zip(argv, [*argv, "--"][1:], strict=True):
        flag, equals, value = word.replace("_", "-").partition("=")
        given = value if equals else following
        if fields.get(flag) and (equals or not given.startswith("-")):
            name = flag if f"--no-{flag[2:]}" in fields else f"--{flag[5:]}"
            yield (
                f"{flag} {given}: a switch takes no value. Write {name} to switch it on, "
                f"--no-{name[2:]} to switch it off."
            )


def _unknown(argv: Sequence[str], fields: dict[str, bool], prog: str) -> Iterator[str]:
    for word in argv:
        flag = word.partition("=")[0]
        if flag.startswith("--") and flag.replace("_", "-") not in fields:
            hint = did_you_mean(flag, fields) or f" {prog} --help lists all flags."
            yield f"{flag}: no such flag.{hint}"
