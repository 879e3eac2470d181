"""Random mutations of the package, by cosmic-ray's operators.

Every place that an operator can change is equally likely, whatever the number of its variants (a
binary operator has eleven). Places where a change has no effect that a test could see are left out
by rule: type annotations, log calls, arguments of the dataclass decorator. Docstrings and comments
have no operator.
"""

import dataclasses
import difflib
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

NEED_ARGUMENTS = ("VariableReplacer", "VariableInserter", "NoOp")
"""Operators that are for one variable name, or for none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mutation:
    """One change of one file."""

    path: str
    """Relative to the repository."""
    line: int
    operator: str
    occurrence: int
    """Which of the operator's places in the file."""

    def code(self, root: Path) -> str:
        """The whole file, changed."""
        source = (root / self.path).read_text()
        mutated = mutate_code(source, get_operator(self.operator)(), self.occurrence)
        assert isinstance(mutated, str) and mutated != source, self
        return mutated

    def diff(self, root: Path) -> list[str]:
        """The changed lines, with - and + before them."""
        before, after = (root / self.path).read_text(), self.code(root)
        lines = difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0)
        return [line for line in lines if line[:2] not in ("--", "++", "@@")]


def draw(root: Path, package: str, count: int, seed: int) -> list[Mutation]:
    """Mutations of different places, in random order."""
    places: dict[tuple[str, int, int, str], list[Mutation]] = defaultdict(list)
    operators = {
        name: get_operator(name)()
        for name in operator_names()
        if not any(word in name for word in NEED_ARGUMENTS)
    }
    for path in sorted((root / package).rglob("*.py")):
        nodes = list(ast_nodes(get_ast(path.read_text())))
        left_out = {id(node) for node in nodes if _is_left_out(node)}
        for name, operator in operators.items():
            occurrence = 0
            for node in nodes:
                for begin, _ in operator.mutation_positions(node):
                    if id(node) not in left_out:
                        kind = name.split("/")[1].split("_")[0]
                        mutation = Mutation(
                            path=str(path.relative_to(root)),
                            line=begin[0],
                            operator=name,
                            occurrence=occurrence,
                        )
                        places[mutation.path, *begin, kind].append(mutation)
                    occurrence += 1
    chooser = random.Random(seed)
    return [chooser.choice(places[place]) for place in chooser.sample(sorted(places), count)]


def _is_left_out(node: Any) -> bool:
    """Whether a node lies where no test could see a change."""
    while (parent := node.parent) is not None:
        if parent.type == "annassign" and node is parent.children[1]:
            return True
        if parent.type == "tfpdef" and node is parent.children[-1]:
            return True
        if parent.type == "funcdef" and node is parent.annotation:
            return True
        if parent.type == "expr_stmt" and _is_type_alias(parent):
            return True
        if node.type in ("decorator", "atom_expr", "power"):
            code = node.get_code(include_prefix=False)
            if code.startswith(("@dataclasses.dataclass(", "logger.")):
                return True
        node = parent
    return False


def _is_type_alias(statement: Any) -> bool:
    """A name in CamelCase, set at the top of a module."""
    name = statement.get_first_leaf().value
    is_at_top = statement.parent.parent.type == "file_input"
    return bool(is_at_top and name[0].isupper() and not name.isupper())
