"""Runs in processes of their own: one is begun, watched, stopped when we are, and judged.

What one leaves in memory or in a compiler's cache is not the next one's, and what kills one does
not kill the rest. Each is an ordinary run, which `attnlab train` goes on with.
"""

import contextlib
import json
import logging
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

from attnlab.comparison import Entry
from attnlab.config import to_json
from attnlab.errors import AttnlabError, DataError, UserError
from attnlab.files import replace_file
from attnlab.signals import Signals
from attnlab.workdir import Workdir
from attnlab.workdir import compare as changes

log = logging.getLogger(__name__)

PROGRAM = (sys.executable, "-m", "attnlab")
CONFIG = "entry.json"
"""The config that a run was asked to have, in its directory."""
POLL = 0.2  # seconds between two looks at a child
PREFIX = "attnlab: "  # of the last line of a child that failed


@contextlib.contextmanager
def kept(entry: Entry, head: str) -> Iterator[None]:
    """What goes wrong inside is kept in the entry, and said."""
    try:
        yield
    except UserError as error:
        entry.fail("refused", str(error), error.code)
    except AttnlabError as error:
        entry.fail("failed", str(error), error.code)
    if entry.reason:
        log.warning("%s: %s: %s", head, entry.state, entry.reason)


def train_apart(
    entry: Entry, head: str, signals: Signals, environment: Mapping[str, str], mark: str = "  "
) -> None:
    """Trains the run of an entry in a child, from wherever it stands, unless it is finished.

    ``mark`` begins the lines of the child that we repeat. Raises `DataError` where nothing can be
    written.
    """
    if finished(entry):
        log.info("%s: finished before", head)
    else:
        log.info("%s: training in %s", head, entry.path)
        prepare(entry)
        asked = [f"--config={entry.path / CONFIG}", f"--workdir={entry.path}"]
        run_child(entry, ["train", *asked], signals, environment, mark)
    if not entry.reason and finished(entry):
        entry.state = "finished"


def finished(entry: Entry) -> bool:
    """Whether the run of exactly this config is done."""
    if not (entry.path / "config.json").is_file():
        return False
    run, now = Workdir(entry.path), json.loads(to_json(entry.config))
    return run.finished() is not None and not changes(run.config(), now)


def prepare(entry: Entry) -> Path:
    """Writes the config of an entry into its directory, and returns the file."""
    Workdir(entry.path)
    try:
        replace_file(entry.path / CONFIG, to_json(entry.config).encode())
    except OSError as error:
        raise DataError(f"cannot write in {entry.path}: {error.strerror}") from None
    return entry.path / CONFIG


def run_child(
    entry: Entry,
    arguments: Sequence[str],
    signals: Signals,
    environment: Mapping[str, str],
    mark: str = "  ",
) -> None:
    """Runs ``attnlab ARGUMENTS`` to its end: its stdout goes to output.txt, its stderr also to
    ours. A signal that we received is passed on once. Why it did not end well is kept."""
    with open(entry.path / "output.txt", "ab") as output:
        output.write(f"$ {shlex.join(['attnlab', *arguments])}\n".encode())
        output.flush()
        child = subprocess.Popen(
            [*PROGRAM, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C must reach it once, from here
        )
        assert child.stderr is not None
        lines: list[str] = []
        aim = (child.stderr, output, lines, mark)
        reader = threading.Thread(target=_relay, args=aim, daemon=True)
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


def _relay(stream: BinaryIO, output: BinaryIO, lines: list[str], mark: str) -> None:
    """Copies what a child says on stderr, line by line, and keeps the last ones."""
    for raw in stream:
        text = raw.decode(errors="replace")
        output.write(raw)
        output.flush()
        lines.append(text.strip())
        del lines[:-50]
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(f"{mark}{text}")
            sys.stderr.flush()
