"""``attnlab compare``: every mechanism trained under the same data, model and optimizer.

Each entry is an ordinary run in a directory of its own below the workdir, trained and then asked to
recall a planted string, by one fresh process after another: what one leaves in memory or in a
compiler's cache is not the next one's. A finished run is not trained again, an entry that cannot be
trained is reported and does not stop the rest.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from attnlab import tasks
from attnlab.children import kept, run_child, train_apart
from attnlab.comparison import Entry, collect
from attnlab.entries import differences, folder_of, make_configs, parse_entries
from attnlab.errors import AttnlabError, UserError
from attnlab.files import read_json
from attnlab.kinds import kind_of
from attnlab.limits import validate
from attnlab.plan import estimate_cost
from attnlab.scoreboard import format_table, write
from attnlab.signals import Signals
from attnlab.train import storing
from attnlab.workdir import Workdir

log = logging.getLogger(__name__)


def compare(
    config: ConfigDict,
    attention: str,
    workdir: str | Path,
    overrides: Sequence[tuple[str, str]] = (),
    command: Sequence[str] = ("attnlab", "compare"),
) -> int:
    """Trains and measures every entry of ``attention`` in turn, from wherever each stands, and
    writes the comparison into ``workdir``. See `attnlab.entries` for what may be written in
    ``attention`` and ``overrides``.

    Returns the exit code: 0, that of the first entry that failed, or 130 / 143 after a signal.
    Raises `UserError` for entries or fields that do not exist and a workdir that is a single run or
    in use, `DataError` where nothing can be written.
    """
    entries = parse_entries(attention)
    configs, notes = make_configs(config, entries, overrides)
    assert not differences(list(configs.values()))
    for note in notes:
        log.warning("%s", note)
    if (Path(workdir) / "config.json").exists():
        raise UserError(f"{workdir} holds a single run; choose another workdir to compare in")
    # Compilation is done anew, because the memory that it takes is part of the peak.
    environment = {"JAX_ENABLE_COMPILATION_CACHE": "false", **os.environ}
    with Signals() as signals, Workdir(workdir) as place:
        task: Any = tasks.build(config.task, seed=config.seed)
        found = [
            Entry(label, each, place.path / folder_of(label), task)
            for label, each in configs.items()
        ]
        for number, entry in enumerate(found, 1):
            if not signals.received:
                _run(entry, f"[{number}/{len(found)}] {entry.label}", signals, environment)
        result = collect(found, notes, command)
        with storing(place.path):
            write(result, place.path)
    print(format_table(result))
    print(f"written: {place.path / 'comparison.html'}, .md, .json and .png")
    return signals.exit_code or next((entry.code for entry in found if entry.code), 0)


def _run(entry: Entry, head: str, signals: Signals, environment: Mapping[str, str]) -> None:
    """Trains and measures one entry; what went wrong is kept in it."""
    with kept(entry, head):
        validate(entry.config)
        _count(entry)
        train_apart(entry, head, signals, environment)
        asks = entry.state == "finished" and kind_of(entry.config).has_text
        if asks and not _measured(entry) and not signals.received:
            run_child(entry, ["needle", f"--workdir={entry.path}"], signals, environment)


def _count(entry: Entry) -> None:
    """Traces the model without computing anything, so that a combination without meaning is
    refused before a process is started for it. A bug is left to that process to tell."""
    try:
        model = kind_of(entry.config).make_model(entry.config, entry.task)
        entry.estimate = estimate_cost(entry.config, model)
    except AttnlabError:
        raise
    except Exception as error:
        log.warning("%s: its cost cannot be counted: %s", entry.label, error)


def _measured(entry: Entry) -> bool:
    """Whether the recall of the last step is known."""
    run = Workdir(entry.path).finished()
    try:
        return bool(run) and read_json(entry.path / "needle.json")["step"] == run["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
