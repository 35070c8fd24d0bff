"""Text typed on a command line, read as a value of a known type."""

import types
import typing
from typing import Any

from attnlab.errors import UserError

TRUE, FALSE, NONE = ("true", "yes", "1"), ("false", "no", "0"), ("none", "null")

_EXPECTED = {
    int: "an integer, such as 4",
    float: "a number, such as 0.001",
    bool: "true or false",
    type(None): "none",
}


def parse(text: str, kind: Any, where: str) -> Any:
    """`text` as an int, float, bool, str, None, Literal, or a union or tuple of those.

    A tuple is written ``1,2`` or ``(1,2)``; of a union the first member that fits is taken, str
    last. Raises `UserError`, beginning with ``where=text``, that names the type and an example.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _parse_union(text, args, where)
    if origin is tuple or kind is tuple:
        return _parse_tuple(text, args, where)
    if origin is typing.Literal:
        for choice in args:
            if text == str(choice):
                return choice
        raise UserError(f"{where}={text}: not one of {', '.join(map(str, args))}")
    if kind is str:
        return text
    lowered = text.strip().lower()
    if kind is type(None) and lowered in NONE:
        return None
    if kind is bool and lowered in TRUE + FALSE:
        return lowered in TRUE
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    raise UserError(f"{where}={text}: expected {_EXPECTED[kind]}")


def text_of(value: Any) -> str:
    """What `parse` reads as `value`: ``none``, ``true``, ``0.5``, ``1,2``."""
    if isinstance(value, tuple | list):
        return ",".join(map(text_of, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return value if isinstance(value, str) else repr(value)


def kind_of(value: Any) -> Any:
    """The type to read a replacement of `value` by."""
    return tuple[type(value[0]), ...] if isinstance(value, tuple) and value else type(value)


def _parse_union(text: str, args: tuple, where: str) -> Any:
    for member in sorted(args, key=lambda member: member is str):
        try:
            return parse(text, member, where)
        except UserError:
            continue
    expected = " or ".join(_EXPECTED.get(member, str(member)) for member in args)
    raise UserError(f"{where}={text}: expected {expected}")


def _parse_tuple(text: str, args: tuple, where: str) -> tuple:
    items = [item.strip() for item in text.strip().strip("()[]").split(",") if item.strip()]
    if not args or args[-1] is Ellipsis:
        args = (args[0] if args else str,) * len(items)
    if len(items) != len(args):
        raise UserError(f"{where}={text}: expected {len(args)} values, separated by commas")
    return tuple(parse(item, kind, where) for item, kind in zip(items, args))
