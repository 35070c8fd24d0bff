"""``attnlab sweep``: a list of configs, each trained by a process and in a directory of its own.

A point is an ordinary run below the workdir, so it can be gone on with, evaluated and reported like
any other; sweep.json says which belong to the sweep and what differs between them. A finished point
is not trained again, one that fails is reported and does not stop the rest.
"""

import os
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from attnlab.children import finished, kept, prepare, train_apart
from attnlab.comparison import Entry
from attnlab.config import flat
from attnlab.errors import UserError
from attnlab.files import write_json
from attnlab.limits import validate
from attnlab.points import Point, differing, make_points, shorten
from attnlab.signals import Signals
from attnlab.slurm import array_of, write_script
from attnlab.sweep_table import RECORD, collect, format_table, write
from attnlab.train import storing
from attnlab.workdir import Workdir


def sweep(
    configs: Sequence[ConfigDict],
    workdir: str | Path,
    *,
    workers: int = 1,
    slurm: bool = False,
    command: Sequence[str] = ("attnlab", "sweep"),
) -> int:
    """Trains every config, ``workers`` at a time, from wherever each stands, and writes the table
    into ``workdir``; with ``slurm`` only the script of a job array.

    Returns the exit code: 0, that of the first point that failed, or 130 / 143 after a signal.
    Raises `UserError` for configs that are the same and a workdir that is a single run or in use,
    `DataError` where nothing can be written.
    """
    if workers < 1:
        raise UserError(f"--workers={workers}: must be at least 1")
    points = make_points(configs)
    if (Path(workdir) / "config.json").exists():
        raise UserError(f"{workdir} holds a single run; choose another workdir to sweep in")
    with Signals() as signals, Workdir(workdir) as place, storing(place.path):
        entries = [
            Entry(point.folder, point.config, place.path / point.folder, None) for point in points
        ]
        record = describe(points, command)
        write_json(place.path / RECORD, record)
        if slurm:
            return _hand_over(entries, place.path)
        _run_all(entries, signals, workers)
        record["stopped"] = {
            entry.label: {"state": entry.state, "reason": entry.reason}
            for entry in entries
            if entry.reason
        }
        write_json(place.path / RECORD, record)
        result = collect(place.path)
        write(result, place.path)
    print(format_table(result))
    print(f"written: {place.path / 'sweep.html'} and .md")
    return signals.exit_code or next((entry.code for entry in entries if entry.code), 0)


def describe(points: Sequence[Point], command: Sequence[str]) -> dict[str, Any]:
    """What the workdir keeps of a sweep, as JSON."""
    fields = [flat(point.config) for point in points]
    differ = differing(fields)
    shared = {path: value for path, value in fields[0].items() if path not in differ}
    return {
        "command": list(command),
        "fields": list(shorten(differ).values()),
        "points": [{"folder": point.folder, "values": point.values} for point in points],
        "shared": {k: v for k, v in shared.items() if all(k in each for each in fields)},
        "stopped": {},
    }


def _run_all(entries: Sequence[Entry], signals: Signals, workers: int) -> None:
    """Every point once, so many at a time; none is begun after a signal."""
    environment = {**os.environ}

    def run(numbered: tuple[int, Entry]) -> None:
        number, entry = numbered
        if signals.received:
            return
        head = f"[{number}/{len(entries)}] {entry.label}"
        mark = f"  {entry.label}: " if workers > 1 else "  "
        with kept(entry, head), storing(entry.path):
            validate(entry.config)
            train_apart(entry, head, signals, environment, mark)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, enumerate(entries, 1)))


def _hand_over(entries: Sequence[Entry], folder: Path) -> int:
    """Writes what a job array needs, and says how it is submitted."""
    for entry in entries:
        validate(entry.config)
        prepare(entry)
    todo = [number for number, entry in enumerate(entries) if not finished(entry)]
    script = write_script(folder, [entry.path for entry in entries])
    if not todo:
        print("every point is finished; nothing to submit")
        return 0
    print(f"written: {script}; edit its head, then submit it with:")
    print(f"sbatch --array={array_of(todo)} {shlex.quote(str(script))}")
    print(f"and, when it is done: attnlab report {shlex.quote(str(folder))}")
    return 0
