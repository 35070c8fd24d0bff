"""What ``config.attention.name`` may say: names, parts after ``:``, layers joined by ``+``.

    window                          one mechanism in every layer
    heads:window:lsh                one that is made of others
    heads:window:lsh+softmax        a pattern over the layers, cycled from the first

The options of a layer that stands alone are those of the section; every part, and every layer of a
pattern, has a sub-section under its name (the stem of a file of the user's own), which all its
places share.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from attnlab.combination import Combination, options
from attnlab.core import Mechanism, mechanisms
from attnlab.errors import UserError

ALONE = ""
"""The key of options that stand in the section itself."""


class Layer(NamedTuple):
    """The registry name of a mechanism, and of each of its parts in order."""

    name: str
    parts: tuple[str, ...]


def layers_of(pattern: str) -> tuple[Layer, ...]:
    """The layers of one cycle.

    Raises `UserError` for an unknown name, and for parts of what is not made of parts or is part of
    something itself.
    """
    layers = []
    for text in pattern.split("+"):
        name, *parts = text.split(":")
        if "" in (name, *parts):
            raise UserError(f"attention={pattern}: a name is missing before or after : or +")
        if issubclass(mechanisms.get(name), Combination):
            parts = parts or mechanisms.get(name).default_parts
        elif parts:
            raise UserError(
                f"attention={pattern}: {name} is not made of parts; write heads:{text} to give "
                f"each its share of the heads, paths:{text} to mix them"
            )
        for part in parts:
            if issubclass(mechanisms.get(part), Combination):
                raise UserError(f"attention={pattern}: {part} may not itself be a part")
        layers.append(Layer(name, tuple(parts)))
    return tuple(layers)


def classes_of(pattern: str) -> dict[str, type[Mechanism]]:
    """Key of the (sub-)section -> the class whose options it holds; see `ALONE`.

    Raises `UserError` as `layers_of`, and for two things with the same key.
    """
    typed = re.split(r"[+:]", pattern)
    _keyed(pattern, typed if "+" in pattern else typed[1:])  # before a file is run for its name
    layers = layers_of(pattern)
    parts = [part for layer in layers for part in layer.parts]
    if len(layers) == 1:
        names = {ALONE: layers[0].name, **_keyed(pattern, parts)}
    else:
        names = _keyed(pattern, [*(layer.name for layer in layers), *parts])
    found = {key: mechanisms.get(name) for key, name in names.items()}
    for field in options(found[ALONE]) if ALONE in found else ():
        if field.name in found:
            raise UserError(
                f"attention={pattern}: {field.name!r} is both a part and an option of "
                f"{names[ALONE]}; use another name for {names[field.name]}"
            )
    return found


def build(pattern: str, fields: dict[str, Any]) -> tuple[Mechanism, ...]:
    """The mechanisms of one cycle, from the ``fields`` of the section but its ``name``."""
    classes = classes_of(pattern)
    alone = {key: value for key, value in fields.items() if key not in classes}

    def one(layer: Layer) -> Mechanism:
        given = dict(alone if ALONE in classes else fields[key_of(layer.name)])
        if layer.parts:
            given["parts"] = tuple(
                mechanisms.get(part)(**fields[key_of(part)]) for part in layer.parts
            )
        return mechanisms.get(layer.name)(**given)

    return tuple(one(layer) for layer in layers_of(pattern))


def defaults(cls: type) -> dict[str, Any]:
    """The options of a dataclass at their defaults: what an instance without arguments holds."""
    names = [field.name for field in options(cls)]
    if "name" in names:
        raise TypeError(f"{cls.__qualname__}: the config section uses 'name' for the file name")
    instance = cls()
    return {name: getattr(instance, name) for name in names}


def _keyed(pattern: str, names: Iterable[str]) -> dict[str, str]:
    """Names by their keys."""
    keys: dict[str, str] = {}
    for name in names:
        key = key_of(name)
        if keys.setdefault(key, name) != name:
            raise UserError(f"attention={pattern}: {keys[key]} and {name} share the name {key!r}")
    return keys


def key_of(name: str) -> str:
    """The section key of a registry name."""
    return name.rpartition("/")[2].removesuffix(".py")
