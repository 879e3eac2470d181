"""Which test files can reach a module, nearest and cheapest first, by who imports whom.

Imports inside functions count, and so do names of modules and tools in strings, which is how tests
start processes. What is found by listing a folder (methods, architectures) counts as imported by
the package's modules that import by name.
"""

import ast
import re
from collections import deque
from functools import cache
from pathlib import Path, PurePosixPath

PACKAGE = "megatron_ponder"
FOLDERS = ("unit", "rules", "golden", "hf", "fake_cuda", "parity", "e2e")
"""Of tests, the cheapest first; those of tests/gpu need a device."""
SCRIPT = re.compile(r"\b(?:(?:tools|examples)/)?[\w/]+\.py\b")
MODULE = re.compile(rf"\b(?:{PACKAGE}|tests|benchmarks)(?:\.\w+)+")


class Reach:
    """The graph of imports of a repository."""

    def __init__(self, root: Path) -> None:
        self._root = root
        files = [
            p
            for top in (PACKAGE, "tests", "benchmarks", "tools", "examples")
            for p in sorted((root / top).rglob("*.py"))
        ]
        self._paths = [str(p.relative_to(root)) for p in files]
        self._by_module = {_module(p): p for p in self._paths}
        self._by_name: dict[str, list[str]] = {}
        for path in self._paths:
            self._by_name.setdefault(PurePosixPath(path).name, []).append(path)
        self._imports = {path: self._imported(path) for path in self._paths}

    def tests_of(self, path: str) -> tuple[list[str], list[str]]:
        """The test files near a module of the package, and all others that reach it.

        Near are the tests in the folder that mirrors the module's sub-package, and those that
        import the module, or whose helpers do.
        """
        folder = "/".join(("tests/unit", *PurePosixPath(path).parts[1:-1][:1]))
        near, far = [], []
        for test in self._paths:
            parts = PurePosixPath(test).parts
            if not parts[-1].startswith("test_") or parts[1] not in FOLDERS:
                continue
            distance = self._distances(test).get(path)
            is_mirror = str(PurePosixPath(test).parent) == folder
            if distance is None and not is_mirror:
                continue
            is_namesake = PurePosixPath(test).stem == f"test_{PurePosixPath(path).stem}"
            key = (
                not (is_mirror and is_namesake),
                not is_mirror,
                99 if distance is None else distance,
                FOLDERS.index(parts[1]),
                test,
            )
            (near if is_mirror or distance == 1 else far).append((key, test))
        return [test for _, test in sorted(near)], [test for _, test in sorted(far)]

    @cache  # noqa: B019
    def _distances(self, test: str) -> dict[str, int]:
        """Imports from a test to each file; going through files of tests is free."""
        distances = {test: 0}
        queue = deque([test])
        while queue:
            path = queue.popleft()
            for other in self._imports[path]:
                is_free = other.startswith("tests/")
                distance = distances[path] + (not is_free)
                if other not in distances or distance < distances[other]:
                    distances[other] = distance
                    (queue.appendleft if is_free else queue.append)(other)
        return distances

    def _imported(self, path: str) -> set[str]:
        """Files that a file imports, or names in a string."""
        names: set[str] = set()
        found: set[str] = set()
        source = (self._root / path).read_text()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.ImportFrom):  # from . import, in remote code
                names |= {f"{_module(path).rpartition('.')[0]}.{a.name}" for a in node.names}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                names |= set(MODULE.findall(node.value))
                for script in SCRIPT.findall(node.value):
                    found |= set(self._by_name.get(PurePosixPath(script).name, []))
        folders = PurePosixPath(path).parents
        if "import_module" in source and path.startswith(PACKAGE):
            depth = path.count("/")
            below = (p for p in self._paths if p.startswith(f"{folders[0]}/"))
            found |= {p for p in below if p.count("/") > depth}
        if path.startswith("tests/"):
            found |= {f"{folder}/conftest.py" for folder in folders} & set(self._paths)
        for name in names:
            if name in self._by_module:
                found.add(self._by_module[name])
        return found - {path}


def _module(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
