"""What must be installed, and what is wrong with the packages that are.

`setup.py` takes its list from here. Imports the standard library only: it must work where nothing
is installed.
"""

import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator

REQUIREMENTS = (
    "torch>=2.6",
    "megatron-core>=0.16.1,<0.20",
    "psutil",  # megatron-core's checkpoint writer needs it and does not declare it
    "numpy",
    "tyro>=1.0",
    "docstring-parser",
    "pyyaml",
    "sentencepiece>=0.2",
    "tokenizers>=0.20",
    "transformers>=4.56",
    "safetensors",
    "orjson",
    "pyarrow",
    "tqdm",
    "tensorboard",
    "matplotlib",
)
LOADING_ERRORS = (ImportError, OSError, RuntimeError, AttributeError)
"""What the import of a library that does not fit this machine raises."""
IMPORTED_BY_MEGATRON_CORE = {
    "transformer_engine": LOADING_ERRORS,
    "apex": (OSError, RuntimeError, AttributeError),
}
"""Libraries that megatron-core imports if they are installed, whatever the settings are; and the
errors of theirs with which its own import fails."""


def problems() -> Iterator[str]:
    """What is wrong with the installation; one line each, with what to do."""
    missing = []
    for requirement in REQUIREMENTS:
        name, bounds = re.fullmatch(r"([\w-]+)(.*)", requirement).groups()  # type: ignore[union-attr]
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(requirement)
            continue
        if not _is_within(version, bounds):
            yield f"{name} {version} does not fit: pip install '{requirement}'"
    if missing:
        yield (
            f"not installed: {', '.join(missing)}. `make install` installs everything into .venv; "
            "use it with `. .venv/bin/activate`."
        )
    for library, fatal in IMPORTED_BY_MEGATRON_CORE.items():
        error = loading_error(library)
        if isinstance(error, fatal):
            yield (
                f"{library} is installed, but cannot be loaded: {error}. megatron-core imports it, "
                "so nothing runs. Install a build for this torch and CUDA, or uninstall it."
            )


def loading_error(module: str) -> Exception | None:
    """Why a module that is installed cannot be imported; None: it can, or is not installed."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        return None
    try:
        importlib.import_module(module)
    except LOADING_ERRORS as error:
        return error
    return None


def _is_within(version: str, bounds: str) -> bool:
    """Whether a version satisfies '>=a,<b'; only numbers are compared."""
    have = _numbers(version)
    for bound in filter(None, bounds.split(",")):
        limit = _numbers(bound.lstrip("<>="))
        if have < limit if bound.startswith(">=") else have >= limit:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.6.0a0+git is (2, 6, 0)."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()
