"""The time that README.md and the Makefile promise is the one that the program estimates."""

import re
from pathlib import Path

from steps import Options, Quickstart

ROOT = Path(__file__).parents[3]


def test_one_estimate_everywhere(tmp_path: Path) -> None:
    quickstart = Quickstart(Options(folder=tmp_path), lock=-1)
    minutes = round(sum(step.estimate_s for step in quickstart.steps()) / 60)
    readme, makefile = ((ROOT / name).read_text() for name in ("README.md", "Makefile"))
    assert re.findall(r"After installation this takes about (\d+) minutes", readme) == [
        str(minutes)
    ]
    assert re.findall(r"^quickstart:.*\((\d+) minutes on 2 cores", makefile, re.M) == [str(minutes)]


def test_the_tests_take_as_long_in_both() -> None:
    said = [
        re.findall(pattern, (ROOT / name).read_text(), re.M)
        for name, pattern in (
            ("README.md", r"need no GPU, in about (\d+) minutes"),
            ("Makefile", r"^test:.*\((\d+) minutes"),
        )
    ]
    assert len(said[0]) == 1 and said[0] == said[1]
