"""The help of the tools opens with an example that can be pasted."""

import ast
import re
from pathlib import Path

import pytest

from tests.rules.sources import ROOT

TOOLS = sorted((ROOT / "tools").glob("*.py"))


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.stem)
def test_tools_open_with_an_example_and_lose_no_line_continuation(tool: Path) -> None:
    text = ast.get_docstring(ast.parse(tool.read_text("utf-8")), clean=False)
    assert text is not None and f"python tools/{tool.name} " in text
    assert not re.search(r"\S {3,}\S", text), 'a backslash joined two lines: open with r"""'
