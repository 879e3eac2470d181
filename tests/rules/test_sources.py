"""Every rule holds for every file, and every rule finds what it forbids."""

from collections.abc import Callable, Iterator

import pytest

from tests.rules import checks
from tests.rules.sources import Source, python_sources

M = "megatron_ponder/"
LONG_FUNCTION = '"""A module."""\ndef f():\n' + "    pass\n" * 100

PLANTED = [
    (checks.layering, M + "model/x.py", "import megatron_ponder.train.loop"),
    (checks.layering, M + "ponder/x.py", "from megatron_ponder import data"),
    (checks.layering, M + "new/x.py", "import torch"),
    (checks.layering, M + "config/x.py", "def f():\n    from megatron_ponder.log import progress"),
    (
        checks.nothing_below_imports_what_measures_it,
        M + "train/x.py",
        "def f():\n    from benchmarks.steps import OurSteps",
    ),
    (checks.nothing_below_imports_what_measures_it, "benchmarks/x.py", "import tests.ranks"),
    (checks.no_torch_in_config, M + "config/x.py", "def f():\n    import torch.nn"),
    (
        checks.parallel_state_in_one_place,
        M + "model/x.py",
        "from megatron.core import parallel_state",
    ),
    (checks.no_names_compared, M + "model/x.py", "a = config.method == 'ponderlm2'"),
    (checks.no_names_compared, M + "train/x.py", "a = name in ('llama', 'other')"),
    (checks.no_names_compared, M + "train/x.py", "match a:\n    case 'gpt2':\n        pass"),
    (checks.sizes, M + "model/x.py", "a = 1\n" * 601),
    (checks.sizes, "tools/x.py", "a = 1\n" * 81),
    (checks.sizes, "tests/x.py", LONG_FUNCTION),
    (checks.opens_with_docstring, "tests/x.py", "a = 1"),
    (checks.names, M + "model/utils.py", ""),
    (checks.ascii_only, "tests/x.py", "a = '\u2014'"),
    (checks.narrow_excepts, M + "model/x.py", "try:\n    f()\nexcept:\n    pass"),
    (
        checks.narrow_excepts,
        M + "model/x.py",
        "try:\n    f()\nexcept (OSError, Exception):\n    pass",
    ),
]


@pytest.mark.parametrize("check", checks.CHECKS)
def test_rule_holds(check: Callable[[Source], Iterator[str]]) -> None:
    sources = python_sources()
    assert len(sources) > 50
    broken = [problem for source in sources for problem in check(source)]
    assert not broken, "\n".join(broken)


def test_no_import_cycles() -> None:
    cycles = list(checks.import_cycles(python_sources()))
    assert not cycles, "\n".join(cycles)


def test_an_import_cycle_is_found() -> None:
    package = M.rstrip("/")
    lazy = f"def f():\n    from {package}.model import b"
    sources = [
        Source(M + "model/a.py", lazy),
        Source(M + "model/b.py", f"import {package}.model.c"),
        Source(M + "model/c.py", f"from {package}.model.a import f"),
    ]
    names = " imports ".join(f"{package}.model.{letter}" for letter in "abca")
    assert list(checks.import_cycles(sources)) == [names]
    assert not list(checks.import_cycles(sources[1:]))


@pytest.mark.parametrize(
    ("check", "path", "text"), PLANTED, ids=lambda v: getattr(v, "__name__", None)
)
def test_rule_finds(check: Callable[[Source], Iterator[str]], path: str, text: str) -> None:
    assert list(check(Source(path, text)))


def test_every_rule_was_tried() -> None:
    assert {planted[0] for planted in PLANTED} == set(checks.CHECKS)
