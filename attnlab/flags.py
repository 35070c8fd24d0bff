"""The words after ``attnlab``: one command, its positional arguments and its flags.

``--flag=value`` and ``--flag value`` are the same; ``--config.a.b=value`` is kept apart, in order,
for `attnlab.overrides`; after ``--`` everything is a word. Every mistake raises `UserError` with
the nearest known flag.
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attnlab.errors import UserError, did_you_mean
from attnlab.literals import parse


@dataclass(frozen=True)
class Flag:
    """One ``--name``; a flag whose type is bool takes no value."""

    help: str
    kind: type = str
    example: str = ""


@dataclass(frozen=True)
class Command:
    """What a command does (`run` gets the parsed `Line`), and what may follow its name.

    `configured` commands take ``--config.a.b=value``; `arguments` names the positional ones.
    """

    run: Callable[["Line"], int | None]
    summary: str
    flags: Mapping[str, Flag]
    arguments: str = ""
    configured: bool = False


@dataclass
class Line:
    """A parsed command line. `flags` holds only what was given."""

    name: str
    words: list[str] = field(default_factory=list)
    flags: dict[str, Any] = field(default_factory=dict)
    overrides: list[tuple[str, str]] = field(default_factory=list)
    typed: tuple[str, ...] = ()

    def need(self, name: str, example: str) -> Any:
        """The value of a flag that the command cannot do without."""
        if name not in self.flags:
            raise UserError(f"{self.name} needs --{name}, for example --{name}={example}")
        return self.flags[name]


EVERYWHERE = {
    "debug": Flag("print the traceback of an error", bool),
    "help": Flag("print this and exit", bool),
}


def parse_line(name: str, command: Command, typed: Sequence[str]) -> Line:
    """Reads what follows the command's name."""
    line = Line(name, typed=(name, *typed))
    known = {**command.flags, **EVERYWHERE}
    rest = list(typed)
    while rest:
        word = rest.pop(0)
        if word == "--" and command.arguments:
            line.words += rest
            break
        if not word.startswith("--"):
            line.words.append(word)
            continue
        flag, equals, text = word[2:].partition("=")
        override = command.configured and flag.startswith("config.")
        if flag not in known and not override:
            hint = did_you_mean(f"--{flag}", [f"--{n}" for n in known])
            raise UserError(f"{name} has no flag --{flag}; {hint}")
        boolean = not override and known[flag].kind is bool
        if not equals and not boolean:
            if not rest:
                raise UserError(f"--{flag} needs a value: --{flag}=VALUE")
            text = rest.pop(0)
        if override:
            line.overrides.append((flag.removeprefix("config."), text))
        else:
            line.flags[flag] = (
                parse(text or "true", bool, f"--{flag}")
                if boolean
                else parse(text, known[flag].kind, f"--{flag}")
            )
    if line.words and not command.arguments and "help" not in line.flags:
        raise UserError(f"{name}: {line.words[0]!r} is not a flag; flags begin with --")
    return line


def describe(name: str, command: Command) -> str:
    """The help text of one command."""
    flags = {f"--{n}{f.example and '=' + f.example}": f.help for n, f in command.flags.items()}
    if command.configured:
        flags["--config.SECTION.FIELD=VALUE"] = "change one field; as often as needed"
    flags |= {f"--{n}": f.help for n, f in EVERYWHERE.items()}
    usage = " ".join(["usage: attnlab", name, *filter(None, [command.arguments]), "[flags]"])
    return f"{usage}\n\n{textwrap.fill(command.summary, 98)}\n\n{columns(flags)}"


def columns(rows: Mapping[str, str]) -> str:
    """Names and their descriptions, in two columns that fit 100 characters."""
    width = min(34, 2 + max(map(len, rows)))
    lines = []
    for name, text in rows.items():
        first = f"  {name:<{width}}" if len(name) < width else f"  {name}\n  {'':<{width}}"
        wrapped = textwrap.wrap(text, 96 - width) or [""]
        lines.append(f"\n  {'':<{width}}".join([first + wrapped[0], *wrapped[1:]]))
    return "\n".join(lines)
