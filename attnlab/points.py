"""The points of a sweep: configs, what differs between them, and the directory of each.

A directory is named by what differs, as ``attention=window,learning_rate=0.01``; so it depends
neither on the order of the list nor on the machine.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from attnlab.config import REGISTRIES, flat, to_json
from attnlab.entries import folder_of
from attnlab.errors import UserError
from attnlab.literals import text_of

LONGEST = 100  # characters of the name of a directory


class Point(NamedTuple):
    """One config of a sweep; ``values`` of the fields that differ, by their short names."""

    folder: str
    config: ConfigDict
    values: dict[str, Any]


def make_points(configs: Sequence[ConfigDict]) -> list[Point]:
    """The points of a list of configs, in its order.

    Raises `UserError` for an empty list and for two configs that are the same.
    """
    if not configs:
        raise UserError("the sweep has no configs")
    seen: dict[str, int] = {}
    for number, config in enumerate(configs, 1):
        other = seen.setdefault(to_json(config), number)
        if other != number:
            raise UserError(f"configs {other} and {number} of the sweep are the same")
    fields = [flat(config) for config in configs]
    names = shorten(differing(fields))
    points = []
    for config, known in zip(configs, fields):
        values = {name: known[path] for path, name in names.items() if path in known}
        points.append(Point(_folder(values), config, values))
    return points


def differing(fields: Sequence[Mapping[str, Any]]) -> list[str]:
    """The dotted paths in which flat configs differ, by section, its name first. The options of a
    mechanism differ only between configs that have the same one: of others, its name says enough.
    """
    found = []
    paths = {path for each in fields for path in each}
    for path in sorted(paths, key=lambda path: path.replace(".name", ".")):
        section = path.partition(".")[0]
        owner = f"{section}.name" if section in REGISTRIES and path != f"{section}.name" else ""
        values: dict[Any, set[str]] = {}
        for each in fields:
            if path in each:
                values.setdefault(each.get(owner), set()).add(repr(each[path]))
        if any(len(group) > 1 for group in values.values()):
            found.append(path)
    return found


def shorten(paths: Sequence[str]) -> dict[str, str]:
    """Path -> the last word of it, or of ``attention.name`` the first; the whole path where two
    would be called the same."""
    short = {}
    for path in paths:
        section, _, last = path.rpartition(".")
        short[path] = section if last == "name" and section in REGISTRIES else last
    names = list(short.values())
    return {path: name if names.count(name) == 1 else path for path, name in short.items()}


def _folder(values: Mapping[str, Any]) -> str:
    parts = [f"{name}={text_of(value)}" for name, value in values.items()] or ["only"]
    plain = ",".join(map(folder_of, parts))
    if plain == ",".join(parts) and len(plain) <= LONGEST:
        return plain
    # What a file system may not take was replaced: the digest keeps such names apart.
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    return f"{plain[:LONGEST]}-{digest[:8]}"
