"""``attnlab list``: what can be chosen, and everything about one choice."""

import inspect
from collections.abc import Sequence
from typing import Any

from attnlab.errors import UserError, did_you_mean
from attnlab.literals import text_of

CONFIGURED = {
    "mechanisms": "attention",
    "positions": "position",
    "normalisers": "normaliser",
    "tasks": "task",
}
"""The registries whose choices have options, and the config section those options stand in."""

KINDS = (*CONFIGURED, "corpora")


def show(what: str | None = None) -> None:
    """Prints the tables of all kinds, of one kind, or the card of one choice.

    Raises `UserError` for a name that is none of these.
    """
    if what in KINDS:
        _show_kind(what)
    elif what is not None:
        print(_cards(what))
    else:
        for i, kind in enumerate(KINDS):
            print(f"{kind}:" if i == 0 else f"\n{kind}:")
            _show_kind(kind)
        print("\nattnlab list NAME: its equations and options")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in aligned columns, indented by two; nothing for no rows."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ("  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths)) for row in rows)
    return "\n".join(f"  {line}".rstrip() for line in lines)


def _show_kind(kind: str) -> None:
    if kind == "corpora":
        from attnlab.data import tables

        tables.run_list()
    else:
        registry = _registry(kind)
        things = {name: _described(kind, registry.get(name)) for name in registry.names()}
        if kind == "mechanisms":
            head = ("name", "time", "memory", "state", "")
            rows = [(n, *map(_growth, t.cost), _summary(t)) for n, t in things.items()]
            print(table([head, *rows]))
        else:
            print(table([(name, _summary(thing)) for name, thing in things.items()]))


def _cards(name: str) -> str:
    """The docstring of a registered class and its options with their defaults; of every class that
    has this name, since softmax is a mechanism and a normaliser."""
    kinds = [kind for kind in CONFIGURED if name in _registry(kind).names()]
    if not kinds:
        known = {n for kind in CONFIGURED for n in _registry(kind).names()}
        raise UserError(
            f"nothing called {name!r} to list; {did_you_mean(name, known.union(KINDS))}"
        )
    return "\n\n".join(_card(kind, name) for kind in kinds)


def _card(kind: str, name: str) -> str:
    from attnlab.combination import options

    cls, key = _registry(kind).get(name), CONFIGURED[kind]
    typed = [f"--config.{key}.{f.name}={text_of(f.default)}" for f in options(cls)]
    chosen = f"{key}={name}"
    texts = [inspect.getdoc(thing) or "" for thing in dict.fromkeys((_described(kind, cls), cls))]
    return "\n".join([chosen, "", "\n\n".join(texts), "", *(typed or ["no options"])])


def _described(kind: str, cls: type) -> Any:
    """What says what it is: a task's file defines it, and its class the options."""
    return inspect.getmodule(cls) if kind == "tasks" else cls


def _registry(kind: str) -> Any:
    if kind == "tasks":
        from attnlab.tasks import recipes

        return recipes
    from attnlab import core

    return getattr(core, kind)


def _summary(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").partition("\n")[0]


def _growth(exponent: float) -> str:
    """1, N, N^1.5: how a cost grows with the length."""
    return {0.0: "1", 1.0: "N"}.get(exponent, f"N^{exponent:g}")
