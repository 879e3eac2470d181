"""Makes `--help` of every command print the string under each field as one paragraph."""

import dataclasses
import functools
import types
from typing import Any

import docstring_parser
import tyro

HELP = tyro.constructors.ConstructorRegistry()
"""For `tyro.cli(..., registry=HELP)`."""


@HELP.struct_rule
def _as_paragraphs(info: tyro.constructors.StructTypeInfo) -> None:
    """Works round tyro 1.0.17, which keeps the line breaks of strings under fields.

    `remove_single_line_breaks` in its `_strings.py` takes an indented line for one that must stay a
    line. A help text in a field's metadata is printed as it is. Applies to no type itself: tyro's
    own rule follows.
    """
    kinds: tuple[Any, ...] = getattr(info.type, "__mro__", ())
    for kind in kinds:
        if hasattr(kind, "__dataclass_fields__"):
            _set_help(kind)


@functools.cache
def _set_help(kind: Any) -> None:
    """Put the strings of one class into the metadata of its fields."""
    texts = {
        text.arg_name: text.description for text in docstring_parser.parse_from_object(kind).params
    }
    for field in dataclasses.fields(kind):
        if text := texts.get(field.name):
            help_text = {"help": " ".join(text.split())}
            field.metadata = types.MappingProxyType({**field.metadata, **help_text})
