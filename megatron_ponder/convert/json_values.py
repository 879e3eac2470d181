"""JSON files of a Hugging Face folder, and their values against the types of our settings.

Anything can be in a file from elsewhere. What comes out of here is an object of moderate depth, and
a value that passes `problem_of` can be stored under its setting. Imports no torch.
"""

import json
import reprlib
import sys
import types
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megatron_ponder.config.schema import MethodConfig, ModelConfig
from megatron_ponder.errors import ConversionError

MAX_DEPTH = 50
"""Objects and lists inside each other; beyond some hundred Python cannot even print them."""
_LARGEST = 2**31
_LARGEST_FLOAT = sys.float_info.max
_TYPES = get_type_hints(ModelConfig) | get_type_hints(MethodConfig)
_WORDS = {
    int: "a whole number below 2^31",
    float: "a finite number",
    bool: "true or false",
    str: "a string",
}


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        FileNotFoundError: it is not there.
        ConversionError: it cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConversionError(f"{path}: cannot be read: {error}.") from None
    if not isinstance(content, dict):
        raise ConversionError(f"{path}: must be a JSON object.")
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node)]
    if level:
        raise ConversionError(f"{path}: objects and lists are nested more than {MAX_DEPTH} deep.")
    return content


def _children(node: Any) -> list[Any]:
    if isinstance(node, dict):
        return list(node.values())
    return node if isinstance(node, list) else []


def shown(value: object) -> str:
    """A value of a file, short enough for a message."""
    return reprlib.repr(value)


def problem_of(key: str, value: object, setting: str) -> str | None:
    """Why a value cannot be stored under a setting; None if it can, or is null.

    Args:
        key: in the file, for the message.
        value: JSON.
        setting: of the model or the method. A model's whole numbers are sizes, at least 1.
    """
    if value is None:
        return None
    kind = _TYPES[setting]
    if isinstance(kind, types.UnionType):
        (kind,) = (part for part in get_args(kind) if part is not types.NoneType)
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        is_one = isinstance(value, str) and value in choices
        return None if is_one else f"{key} {shown(value)}: must be {' or '.join(choices)}"
    if not _has_type(value, kind):
        return f"{key} {shown(value)}: must be {_WORDS[kind]}"
    if setting in ModelConfig.__dataclass_fields__ and kind is int and value < 1:  # type: ignore[operator]
        return f"{key} {value}: must be at least 1"
    return None


def _has_type(value: object, kind: type) -> bool:
    """Whether JSON means this type: true is no number, 3.0 is no whole one."""
    if kind is float:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        return -_LARGEST_FLOAT <= value <= _LARGEST_FLOAT
    if kind is int and type(value) is int:
        return abs(value) < _LARGEST
    return type(value) is kind
