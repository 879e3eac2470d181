"""The rules of the house, each a function from a file to what is wrong with it."""

import ast
from collections.abc import Iterator, Sequence

from tests.rules.sources import PACKAGE, Source, imported_modules

LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(names.split())
    for names in (
        "errors log config files figures tables installation",
        "runtime",
        "kernels",
        "ponder data",
        "model",
        "parallel optim checkpoint convert inference planning",
        "train",
        "pretrain",
    )
)
"""What may import what: a sub-package imports from its own layer and those above it in this list,
but sub-packages of one layer do not import each other (see SIBLINGS)."""

SIBLINGS = frozenset(
    {
        ("config", "errors"),
        ("errors", "installation"),
        ("log", "errors"),
        ("figures", "files"),
        ("inference", "checkpoint"),
        ("convert", "checkpoint"),
    }
)
"""Imports within a layer; there is no way back."""

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_TOOL_LINES = 600, 100, 80
BANNED_FILE_NAMES = ("utils.py", "helpers.py", "common.py", "misc.py")
NAMED_IN = ("ponder/", "model/specs.py", "convert/", "config/presets.py", "config/schema.py")
METHODS_AND_ARCHITECTURES = frozenset(
    "vanilla ponderlm2 ponderlm loop pause llama gpt_neox gpt2".split()
)
MAY_CATCH_EVERYTHING = (
    "data/tokenizer_json.py",  # tokenizer libraries raise anything
    "convert/verification.py",  # transformers raises anything, by what is odd in a config.json
)


def part_of(module: str) -> str | None:
    """The sub-package or top-level module of ours that a dotted name lies in."""
    names = module.split(".")
    return names[1] if names[0] == PACKAGE and len(names) > 1 else None


def layering(source: Source) -> Iterator[str]:
    """Imports go downwards only."""
    if not source.in_package or source.module == PACKAGE:
        return
    mine = part_of(source.module)
    level = {part: number for number, layer in enumerate(LAYERS) for part in layer}
    if mine not in level:
        yield f"{source.path}: {mine} has no place in the order of sub-packages"
        return
    for module in imported_modules(source):
        other = part_of(module)
        if other is None or other == mine or other.startswith("__"):
            continue
        if other not in level:
            yield f"{source.path}: imports {module}, which has no place in the order"
        elif level[other] > level[mine]:
            yield f"{source.path}: imports {module}, which is above it"
        elif level[other] == level[mine] and (mine, other) not in SIBLINGS:
            yield f"{source.path}: imports {module}, which is beside it"


def import_cycles(sources: Sequence[Source]) -> Iterator[str]:
    """No module imports itself through others, also by imports inside functions."""
    modules = {s.module: s for s in sources if not s.path.startswith("tests/")}
    imports = {
        name: sorted(modules.keys() & set(imported_modules(source)) - {name})
        for name, source in modules.items()
        if not source.path.endswith("__init__.py")
    }
    state: dict[str, bool] = {}  # True while a module's own imports are being followed

    def follow(chain: tuple[str, ...]) -> Iterator[str]:
        state[chain[-1]] = True
        for imported in imports.get(chain[-1], ()):
            if imported not in state:
                yield from follow((*chain, imported))
            elif state[imported]:
                yield " imports ".join((*chain[chain.index(imported) :], imported))
        state[chain[-1]] = False

    for name in imports:
        if name not in state:
            yield from follow((name,))


def nothing_below_imports_what_measures_it(source: Source) -> Iterator[str]:
    """Benchmarks import the package, tests both, never the other way round.

    Benchmarks may import `tests.reference`: the eager forms that they time are the tests' oracle.
    """
    if not source.path.startswith((PACKAGE + "/", "benchmarks/", "tools/")):
        return
    for module in imported_modules(source):
        top = module.split(".")[0]
        is_oracle = source.path.startswith("benchmarks/") and module.startswith("tests.reference")
        if top == "tests" and not is_oracle or top == "benchmarks" and source.in_package:
            yield f"{source.path}: imports {module}"


def no_torch_in_config(source: Source) -> Iterator[str]:
    """Settings, flags and errors are known without torch."""
    if part_of(source.module) not in ("config", "errors", "log"):
        return
    for module in imported_modules(source):
        if module.split(".")[0] in ("torch", "megatron", "numpy"):
            yield f"{source.path}: imports {module}"


def parallel_state_in_one_place(source: Source) -> Iterator[str]:
    """megatron-core's global groups are read in runtime/distributed.py and parallel/ only."""
    if not source.in_package or "/parallel/" in source.path:
        return
    if source.path.endswith("runtime/distributed.py"):
        return
    if any("parallel_state" in module for module in imported_modules(source)):
        yield f"{source.path}: imports parallel_state"


def no_names_compared(source: Source) -> Iterator[str]:
    """Which method or architecture it is, only ponder/ and the spec builder ask."""
    if not source.in_package or source.path.startswith(
        tuple(f"{PACKAGE}/{place}" for place in NAMED_IN)
    ):
        return
    for node in ast.walk(source.tree):
        operands = []
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            operands = [node.value]
        for constant in (c for operand in operands for c in ast.walk(operand)):
            if isinstance(constant, ast.Constant) and constant.value in METHODS_AND_ARCHITECTURES:
                yield f"{source.path}:{node.lineno}: compares with {constant.value!r}"


def sizes(source: Source) -> Iterator[str]:
    """Files and functions that can be read at one sitting."""
    num_lines = source.text.count("\n")
    limit = MAX_TOOL_LINES if source.path.startswith("tools/") else MAX_FILE_LINES
    if num_lines > limit:
        yield f"{source.path}: {num_lines} lines, at most {limit}"
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{source.path}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"


def opens_with_docstring(source: Source) -> Iterator[str]:
    """Every module says what it is."""
    if source.text.strip() and not ast.get_docstring(source.tree):
        yield f"{source.path}: no docstring"


def names(source: Source) -> Iterator[str]:
    """No file is a drawer for everything."""
    if source.path.rsplit("/", 1)[-1] in BANNED_FILE_NAMES:
        yield f"{source.path}: says nothing about what is inside"


def ascii_only(source: Source) -> Iterator[str]:
    """Sources are ASCII; what is not is written as an escape."""
    for number, line in enumerate(source.text.splitlines(), 1):
        if not line.isascii():
            yield f"{source.path}:{number}: not ASCII"


def narrow_excepts(source: Source) -> Iterator[str]:
    """Exceptions are caught by name."""
    if not source.in_package or source.path.endswith(MAY_CATCH_EVERYTHING):
        return
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = [node.type] if node.type else []
        if isinstance(node.type, ast.Tuple):
            caught = node.type.elts
        broad = {"Exception", "BaseException"} & {n.id for n in caught if isinstance(n, ast.Name)}
        if broad or not caught:
            yield f"{source.path}:{node.lineno}: catches everything"


CHECKS = (
    layering,
    nothing_below_imports_what_measures_it,
    no_torch_in_config,
    parallel_state_in_one_place,
    no_names_compared,
    sizes,
    opens_with_docstring,
    names,
    ascii_only,
    narrow_excepts,
)
