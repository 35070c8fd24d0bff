"""Which mechanisms are compared, and their configs: one config each, that differ in nothing else.

``softmax,window,wide=window`` names three entries: a name or pattern that `config.attention` takes,
with a label of its own after ``LABEL=``. ``--config.attention.KEY.FIELD=VALUE`` reaches every entry
that is labelled KEY, and every pattern that KEY is a part of.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from attnlab.config import flat, mechanisms_of, put
from attnlab.errors import UserError, did_you_mean
from attnlab.overrides import override

EXAMPLE = "softmax,window,wide=window"


def parse_entries(text: str) -> dict[str, str]:
    """Label -> attention of each entry of a comma-separated list.

    Raises `UserError` for an empty entry or a label that two of them share.
    """
    entries: dict[str, str] = {}
    for item in text.split(","):
        label, equals, attention = item.strip().rpartition("=")
        label = label if equals else _label(attention)
        if not label or not attention:
            raise UserError(f"--attention={text}: an entry is empty; for example {EXAMPLE}")
        shared = [other for other in entries if folder_of(other) == folder_of(label)]
        if shared:
            raise UserError(
                f"--attention={text}: two entries are called {label!r}; label one of them, "
                f"for example other={attention}"
            )
        entries[label] = attention
    return entries


def folder_of(label: str) -> str:
    """The name of the directory of an entry."""
    return re.sub(r"[^A-Za-z0-9+_=.-]+", "-", label).lower()


def make_configs(
    config: ConfigDict, entries: dict[str, str], overrides: Sequence[tuple[str, str]] = ()
) -> tuple[dict[str, ConfigDict], list[str]]:
    """The config of each entry, and notes on what was changed for all of them.

    ``overrides`` (path, text) may touch only ``attention.KEY.FIELD``. A mechanism that carries a
    state from batch to batch sets ``task.packing=stream`` for every entry. Raises `UserError` for
    an unknown mechanism, KEY or FIELD.
    """
    configs = {label: _config(config, attention) for label, attention in entries.items()}
    for path, text in overrides:
        _override(configs, path, text)
    carriers = [
        label for label, each in configs.items() if any(m.carries for m in mechanisms_of(each))
    ]
    notes = []
    if carriers and "packing" in config.task:
        who = ", ".join(carriers)
        if config.task.packing != "stream":
            for each in configs.values():
                put(each, "task.packing", "stream")
            notes.append(f"task.packing is stream for every entry, because of {who}")
        notes.append(
            f"handed on from window to window of a document, in training and in scoring: the "
            f"state of {who}; every other entry sees no further than one window"
        )
    return configs, notes


def differences(configs: Sequence[ConfigDict]) -> list[str]:
    """The dotted paths, `config.attention` apart, in which configs are not all the same."""
    shared = [
        {
            path: value
            for path, value in flat(config).items()
            if path.partition(".")[0] != "attention"
        }
        for config in configs
    ]
    paths = dict.fromkeys(path for fields in shared for path in fields)
    return [path for path in paths if len({repr(fields.get(path)) for fields in shared}) > 1]


def _label(attention: str) -> str:
    """The attention itself, or the stem of a file of the user's own."""
    return "".join(
        Path(part).stem if part.endswith(".py") else part for part in re.split(r"([+:])", attention)
    )


def _config(config: ConfigDict, attention: str) -> ConfigDict:
    """A copy with that attention; options that the config gives to the same one stay."""
    copy = config.copy_and_resolve_references()
    if attention != config.attention.name:
        override(copy, "attention", attention)
    return copy


def _override(configs: dict[str, ConfigDict], path: str, text: str) -> None:
    """Sets one field in the entries that its key names."""
    inner, known, reached = path.removeprefix("attention."), dict.fromkeys(configs), False
    for label, config in configs.items():
        parts = [key for key, value in config.attention.items() if isinstance(value, ConfigDict)]
        known |= dict.fromkeys(parts)
        if inner.startswith(f"{label}."):
            override(config, f"attention.{inner.removeprefix(f'{label}.')}", text)
        elif any(inner.startswith(f"{part}.") for part in parts):
            override(config, path, text)
        else:
            continue
        reached = True
    if not reached:
        key = inner.partition(".")[0]
        raise UserError(
            f"--config.{path}={text}: write --config.attention.ENTRY.FIELD=VALUE; no entry "
            f"{key!r}; {did_you_mean(key, known)}"
        )
