"""``attnlab compare``: every mechanism trained under the same data, model and optimizer.

Each entry is an ordinary run in a directory of its own below the workdir, trained and then asked to
recall a planted string, by one fresh process after another: what one leaves in memory or in a
compiler's cache is not the next one's. A finished run is not trained again, an entry that cannot be
trained is reported and does not stop the rest.
"""

import contextlib
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from ml_collections import ConfigDict

from attnlab import tasks
from attnlab.comparison import Entry, collect
from attnlab.config import to_json
from attnlab.entries import differences, folder_of, make_configs, parse_entries
from attnlab.errors import AttnlabError, DataError, UserError
from attnlab.files import read_json, replace_file
from attnlab.kinds import kind_of
from attnlab.limits import validate
from attnlab.plan import estimate_cost
from attnlab.scoreboard import format_table, write
from attnlab.signals import Signals
from attnlab.train import storing
from attnlab.workdir import Workdir
from attnlab.workdir import compare as changes

log = logging.getLogger(__name__)

POLL = 0.2  # seconds between two looks at a child
PREFIX = "attnlab: "  # of the last line of a child that failed


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
    with Signals() as signals, Workdir(workdir) as place:
        task: Any = tasks.build(config.task, seed=config.seed)
        found = [
            Entry(label, each, place.path / folder_of(label), task)
            for label, each in configs.items()
        ]
        for number, entry in enumerate(found, 1):
            if not signals.received:
                _run(entry, f"[{number}/{len(found)}] {entry.label}", signals)
        result = collect(found, notes, command)
        with storing(place.path):
            write(result, place.path)
    print(format_table(result))
    print(f"written: {place.path / 'comparison.html'}, .md, .json and .png")
    return signals.exit_code or next((entry.code for entry in found if entry.code), 0)


def _run(entry: Entry, head: str, signals: Signals) -> None:
    """Trains and measures one entry; what went wrong is kept in it."""
    try:
        validate(entry.config)
        _count(entry)
        if _finished(entry):
            log.info("%s: finished before", head)
        else:
            log.info("%s: training in %s", head, entry.path)
            _prepare(entry)
            asked = [f"--config={entry.path / 'entry.json'}", f"--workdir={entry.path}"]
            _child(entry, ["train", *asked], signals)
        if not entry.reason and _finished(entry):
            entry.state = "finished"
            if kind_of(entry.config).has_text and not _measured(entry) and not signals.received:
                _child(entry, ["needle", f"--workdir={entry.path}"], signals)
    except UserError as error:
        entry.fail("refused", str(error), error.code)
    except AttnlabError as error:
        entry.fail("failed", str(error), error.code)
    if entry.reason:
        log.warning("%s: %s: %s", head, entry.state, entry.reason)


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


def _finished(entry: Entry) -> bool:
    """Whether the run of exactly this config is done."""
    if not (entry.path / "config.json").is_file():
        return False
    run, now = Workdir(entry.path), json.loads(to_json(entry.config))
    return run.finished() is not None and not changes(run.config(), now)


def _measured(entry: Entry) -> bool:
    """Whether the recall of the last step is known."""
    run = Workdir(entry.path).finished()
    try:
        return bool(run) and read_json(entry.path / "needle.json")["step"] == run["step"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _prepare(entry: Entry) -> None:
    Workdir(entry.path)
    try:
        replace_file(entry.path / "entry.json", to_json(entry.config).encode())
    except OSError as error:
        raise DataError(f"cannot write in {entry.path}: {error.strerror}") from None


def _child(entry: Entry, arguments: Sequence[str], signals: Signals) -> None:
    """Runs ``attnlab ARGUMENTS`` to its end: its stdout goes to output.txt, its stderr also to
    ours. A signal that we received is passed on once."""
    line = [sys.executable, "-m", "attnlab", *arguments]
    with open(entry.path / "output.txt", "ab") as output:
        output.write(f"$ {shlex.join(['attnlab', *arguments])}\n".encode())
        output.flush()
        child = subprocess.Popen(
            line,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
            env=_environment(os.environ),
            start_new_session=True,  # Ctrl-C must reach it once, from here
        )
        assert child.stderr is not None
        lines: list[str] = []
        reader = threading.Thread(target=_relay, args=(child.stderr, output, lines), daemon=True)
        reader.start()
        told = False
        try:
            while child.poll() is None:
                if signals.received and not told:
                    child.send_signal(signals.received)
                    told = True
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(POLL)
        finally:
            if child.poll() is None:
                child.terminate()
                child.wait()
            reader.join()
            child.stderr.close()
    _judge(entry, child.returncode, lines, told)


def _judge(entry: Entry, code: int, lines: Sequence[str], told: bool) -> None:
    """Writes down why a child did not end well."""
    if code == 0:
        return
    said = [line.removeprefix(PREFIX) for line in lines if line.startswith(PREFIX)]
    if told or code in (130, 143):
        entry.fail("stopped", "the same command goes on", 0)
    elif code < 0:
        name = signal.Signals(-code).name
        why = f"killed by {name}" + ", perhaps for want of memory" * (name == "SIGKILL")
        entry.fail("failed", why, 128 - code)
    else:
        entry.fail("failed", said[-1] if said else (lines or ["it said nothing"])[-1], code)


def _relay(stream: BinaryIO, output: BinaryIO, lines: list[str]) -> None:
    """Copies what a child says on stderr, line by line, and keeps the last ones."""
    for raw in stream:
        text = raw.decode(errors="replace")
        output.write(raw)
        output.flush()
        lines.append(text.strip())
        del lines[:-50]
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"  {text}")
            sys.stderr.flush()


def _environment(now: Mapping[str, str]) -> dict[str, Any]:
    """Compilation is done anew, because the memory that it takes is part of the peak."""
    return {"JAX_ENABLE_COMPILATION_CACHE": "false", **now}
