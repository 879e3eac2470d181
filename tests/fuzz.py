"""Damages inputs at random, and checks that a reader gives an answer or a user error to each.

A fuzz test makes one valid input and calls `survive` with a reader and a way to damage the input:
`damaged_bytes` for files, `damaged_value` for what JSON and YAML hold. The same seed gives the same
mutations. Anything but a return or a PonderError is a fault, and so is a mutation that takes longer
than LIMIT_S or asks for more memory than LIMIT_BYTES. Where readers have been fuzzed, and what was
found, is in docs/benchmarks/*-fuzz.md.
"""

import collections
import contextlib
import copy
import random
import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from megatron_ponder.errors import PonderError

T = TypeVar("T")
COUNT = 500
LIMIT_S = 10.0
"""CPU time of a mutation; wall time would depend on what else the machine does."""
LIMIT_BYTES = 4 << 30
"""Address space beyond that of the process when a test starts."""
FAULTS_SHOWN = 5

ABSURD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3.5, 1e999, float("nan"), 10**30, -(2**63),
    "", " ", "\0", "\ud800", "a.b/../c", "%s{0}", "x" * 5000,
    [], {}, [1], [[]], [None], {"": None}, {"a": {"a": []}},
)  # fmt: skip
NUMBERS = (0, 1, *(2**bits - 1 for bits in (7, 8, 15, 31, 32, 63, 64)), 2**7, 2**15, 2**31)
SNIPPETS = (
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\n", b"\r", b"\\", b"\\ud800", b'"',
    b"null", b"NaN", b"-1", b"1e999", b"[]", b"{}", b": ", b"- ", b"&a [*a]", b"!!",
    b"[" * 3000, b'{"a":' * 3000,
)  # fmt: skip


def survive(
    read: Callable[[T], object],
    damage: Callable[[random.Random], tuple[str, T]],
    *,
    seed: int,
    count: int = COUNT,
) -> collections.Counter[str]:
    """Read `count` mutations.

    Args:
        read: returns, or raises PonderError.
        damage: draws a mutation: the kind of damage in a word, and the damaged input.
        seed: of the draws.
        count: number of mutations.

    Returns:
        How many were "read" and how many "refused".

    Raises:
        AssertionError: one ended otherwise; the message has the first of them.
    """
    outcomes: collections.Counter[str] = collections.Counter()
    faults: list[str] = []
    with _limited_memory():
        for number in range(count):
            kind, mutant = damage(random.Random(f"{seed}/{number}"))
            try:
                with _limited_time():
                    read(mutant)
                outcomes["read"] += 1
            except PonderError as error:
                outcomes["refused"] += 1
                if not str(error).strip():
                    faults.append(f"{number} ({kind}): an error without a message")
            except (Exception, _TooSlow, SystemExit) as error:
                if isinstance(error, OSError) and error.filename is not None:
                    outcomes["refused"] += 1  # exit_on_user_error reports these
                    continue
                where = "".join(traceback.format_tb(error.__traceback__)[-3:])
                faults.append(f"{number} ({kind}): {error!r:.300}\n{where}")
    shown = "\n".join(faults[:FAULTS_SHOWN])
    assert not faults, f"{len(faults)} of {count} mutations ended badly:\n{shown}"
    return outcomes


def damaged_bytes(original: bytes, draw: random.Random) -> tuple[str, bytes]:
    """One to three kinds of damage to the content of a file."""
    content, kinds = original, []
    for _ in range(draw.choice((1, 1, 2, 3))):
        kind = draw.choice(sorted(_BYTES))
        content = _BYTES[kind](content, draw)
        kinds.append(kind)
    return "+".join(kinds), content


def damaged_file(original: bytes, path: Path, draw: random.Random) -> tuple[str, Path]:
    """`damaged_bytes`, written to a file."""
    kind, content = damaged_bytes(original, draw)
    path.write_bytes(content)
    return kind, path


def damaged_value(original: T, draw: random.Random) -> tuple[str, T]:
    """One to three changes anywhere in a tree of dicts and lists; the original is not changed."""
    root, kinds = [copy.deepcopy(original)], []
    for _ in range(draw.choice((1, 1, 2, 3))):
        places = list(_places(root))
        parent, key = draw.choice(places)
        kind = draw.choice(("replaced", "replaced", "removed", "wrapped", "renamed", "swapped"))
        if parent is root and kind in ("removed", "renamed"):
            kind = "replaced"
        if kind == "replaced":
            parent[key] = copy.deepcopy(draw.choice(ABSURD))
        elif kind == "removed":
            del parent[key]
        elif kind == "wrapped":
            parent[key] = [parent[key]] if draw.random() < 0.5 else {"a": parent[key]}
        elif kind == "swapped":
            parent[key] = copy.deepcopy(draw.choice([p[k] for p, k in places]))
        elif isinstance(parent, dict):
            parent[draw.choice(("", "a", f"{key}_", str(key).upper(), 7, None))] = parent.pop(key)
        else:
            parent.insert(key, copy.deepcopy(draw.choice(ABSURD)))
        kinds.append(kind)
    return "+".join(kinds), root[0]


def _places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a tree, as a container and a key or index."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        yield node, key
        if isinstance(value, dict | list):
            yield from _places(value)


def _span(content: bytes, draw: random.Random) -> tuple[int, int]:
    begin = draw.randrange(len(content) + 1)
    return begin, min(begin + draw.choice((1, 2, 4, 8, 30, 200)), len(content))


def _bits(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.choice((1, 2, 8)) if content else 0):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _number(content: bytes, draw: random.Random) -> bytes:
    begin = draw.randrange(len(content) + 1)
    size = draw.choice((1, 2, 4, 8))
    number = draw.choice(NUMBERS) & ((1 << 8 * size) - 1)
    return content[:begin] + number.to_bytes(size, "little") + content[begin + size :]


def _snippet(content: bytes, draw: random.Random) -> bytes:
    begin, end = _span(content, draw)
    return content[:begin] + draw.choice(SNIPPETS) + content[draw.choice((begin, end)) :]


def _removed(content: bytes, draw: random.Random) -> bytes:
    begin, end = _span(content, draw)
    return content[:begin] + content[end:]


def _repeated(content: bytes, draw: random.Random) -> bytes:
    begin, end = _span(content, draw)
    return content[:end] + content[begin:end] * draw.choice((1, 2, 50)) + content[end:]


def _moved(content: bytes, draw: random.Random) -> bytes:
    begin, end = _span(content, draw)
    rest = content[:begin] + content[end:]
    place = draw.randrange(len(rest) + 1)
    return rest[:place] + content[begin:end] + rest[place:]


_BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "bits": _bits,
    "number": _number,
    "snippet": _snippet,
    "removed": _removed,
    "repeated": _repeated,
    "moved": _moved,
    "cut": lambda content, draw: content[: draw.randrange(len(content) + 1)],
    "zeros": lambda content, draw: content + bytes(draw.choice((1, 3, 4, 8, 100))),
    "noise": lambda content, draw: content + draw.randbytes(draw.randrange(1, 40)),
}


class _TooSlow(BaseException):
    """Not an Exception, so that no handler of the reader takes it for a fault of the input."""


@contextlib.contextmanager
def _limited_time() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise _TooSlow(f"took more than {LIMIT_S} s of CPU time")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """Makes a giant allocation a MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LIMIT_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
