"""The project's files as the rules see them."""

import ast
import dataclasses
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = "megatron_ponder"


@dataclasses.dataclass(frozen=True)
class Source:
    """A Python file: its path from the root, and its text."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def module(self) -> str:
        """Dotted name: megatron_ponder/model/norm.py is megatron_ponder.model.norm."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def in_package(self) -> bool:
        return self.path.startswith(PACKAGE + "/")


def tracked_files() -> list[str]:
    """Every file of the project, as git has it or would take it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return sorted(path for path in set(listed.stdout.splitlines()) if (ROOT / path).is_file())


def python_sources() -> list[Source]:
    """Every Python file of the project."""
    return [Source(p, (ROOT / p).read_text("utf-8")) for p in tracked_files() if p.endswith(".py")]


def imported_modules(source: Source) -> list[str]:
    """Every module that a file imports anywhere, also inside functions."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found
