"""The table of a sweep, from what lies in its workdir: a row a point, what differs and its scores.

Nothing is remembered but the list of points, so a point that was trained by hand, or by another
machine, is found as well.
"""

import html
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnlab.children import CONFIG
from attnlab.comparison import Entry, describe_entry
from attnlab.config import from_json
from attnlab.errors import AttnlabError, DataError, UserError
from attnlab.files import read_json, replace_file
from attnlab.literals import text_of
from attnlab.page import plain, table, write_page
from attnlab.scoreboard import markdown_table, short
from attnlab.scores import HEADLINES, headline_of
from attnlab.workdir import Workdir
from attnlab.workdir import compare as changes

RECORD = "sweep.json"
FIGURES = ("validation", "test", "95 %", "steps", "tokens/s", "peak memory")


def is_sweep(path: str | Path) -> bool:
    """Whether a directory holds a sweep."""
    return (Path(path) / RECORD).is_file()


def collect(folder: Path) -> dict[str, Any]:
    """What is known of a sweep, as JSON: its record, and of every point ``state``, ``reason`` and,
    where it is finished, what `attnlab.comparison.describe_entry` finds.

    Raises `DataError` where the record of the sweep is damaged; a damaged point is one that failed.
    """
    try:
        record = read_json(folder / RECORD)
        points = [(str(p["folder"]), dict(p["values"])) for p in record["points"]]
        stopped, shared, fields = record["stopped"], record["shared"], list(record["fields"])
        command = [str(word) for word in record["command"]]
    except (OSError, ValueError, KeyError, TypeError):
        fix = "the same attnlab sweep writes it anew"
        raise DataError(f"no readable {folder / RECORD}; {fix}") from None
    found = [
        {"values": values, **_describe(folder, name, stopped.get(name))} for name, values in points
    ]
    return {"command": command, "fields": fields, "shared": shared, "points": found}


def _describe(folder: Path, name: str, stopped: Mapping[str, str] | None) -> dict[str, Any]:
    """One point: what its directory says, or else why it was stopped."""
    about = {"label": name, "state": "pending", "reason": "", **(stopped or {})}
    place = folder / name
    if not (place / "config.json").is_file():
        return about
    try:
        run = Workdir.existing(place)
        if run.finished() is None:
            return about if stopped else about | {"state": "begun"}
        if (place / CONFIG).is_file() and changes(run.config(), read_json(place / CONFIG)):
            other = f"{place} holds a run with another config; move it away"
            return about | {"state": "failed", "reason": other}
        file = place / "config.json"
        config = from_json(file.read_text(encoding="utf-8"), str(file))
        return describe_entry(Entry(name, config, place, None, state="finished"))
    except (AttnlabError, ValueError) as error:
        return about | {"state": "failed", "reason": str(error)}


def table_rows(result: Mapping[str, Any]) -> list[list[str]]:
    """One row a finished point, in the order of `columns`, the best on the validation split first:
    what is chosen by the test split is not measured by it any more."""
    done, rows = _done(result), []
    headline = _headline(done)
    for point in sorted(done, key=lambda p: p["validation"][headline.key], reverse=headline.higher):
        test = point["test"]
        low_high = test[f"{headline.key}_95"]
        rows.append(
            [
                *_values(result, point),
                f"{point['validation'][headline.key]:.4f}",
                f"{test[headline.key]:.4f}",
                f"{low_high[0]:.3f} to {low_high[1]:.3f}" if low_high else "–",
                f"{point['steps']:,}",
                short(point["tokens_per_second"]),
                short(point["peak_bytes"], "B"),
            ]
        )
    return rows


def columns(result: Mapping[str, Any]) -> list[str]:
    """What differs, and `FIGURES` with the name of the score before the first."""
    first, *others = FIGURES
    return [*result["fields"], f"{_headline(_done(result)).title}: {first}", *others]


def failures(result: Mapping[str, Any]) -> list[list[str]]:
    """What differs, state and reason of every point that is not finished."""
    missing = "the same command goes on"
    return [
        [*_values(result, point), point["state"], point["reason"] or missing]
        for point in result["points"]
        if point["state"] != "finished"
    ]


def format_table(result: Mapping[str, Any]) -> str:
    """The table for a terminal."""
    rows = [columns(result), *table_rows(result)]
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths)).rstrip() for row in rows]
    for *values, state, reason in failures(result):
        named = ", ".join(f"{k}={v}" for k, v in zip(result["fields"], values) if v != "–")
        lines.append(f"{named or 'the only point'}: {state}: {reason}")
    return "\n".join(lines)


def markdown(result: Mapping[str, Any]) -> str:
    """The table as a Markdown page."""
    parts = ["# Sweep\n", markdown_table(columns(result), table_rows(result))]
    if bad := failures(result):
        parts.append(markdown_table([*result["fields"], "state", "why"], bad))
    return "\n".join([*parts, f"```sh\n{shlex.join(result['command'])}\n```\n"])


def page(result: Mapping[str, Any]) -> list[str]:
    """The table as HTML, and how it was made."""
    bad = failures(result)
    done = _done(result)
    count = f"{len(done)} of {len(result['points'])} points are finished"
    shared = [[path, plain(value)] for path, value in result["shared"].items()]
    return [
        "<h1>Sweep</h1>",
        f"<p>{count}; the best on the validation split stands first.</p>",
        f'<div class="wide">{table(columns(result), table_rows(result), own=0)}</div>',
        *([table([*result["fields"], "state", "why"], bad)] if bad else []),
        "<h2>How it was made</h2>",
        f"<pre>{html.escape(shlex.join(result['command']))}</pre>",
        "<details><summary>The same for every point</summary>",
        table(("config", ""), shared),
        "</details>",
    ]


def write(result: Mapping[str, Any], folder: Path) -> None:
    """``sweep.md`` and ``sweep.html`` into the workdir."""
    replace_file(folder / "sweep.md", markdown(result).encode())
    write_page(folder / "sweep.html", f"{folder.name}: sweep", page(result), 80)


def report_sweep(workdir: str | Path, out: str | None = None) -> None:
    """Prints the table of a sweep, and writes it to ``out``. Raises `UserError` for an ``out`` that
    is neither .md nor .html or cannot be written, `DataError` as `collect`."""
    if out and Path(out).suffix not in (".md", ".html"):
        raise UserError(f"--out={out}: must end in .md or .html, the table of a sweep")
    folder = Path(workdir).expanduser()
    result = collect(folder)
    print(format_table(result))
    if not out:
        return
    try:
        if Path(out).suffix == ".md":
            replace_file(out, markdown(result).encode())
        else:
            write_page(Path(out), f"{folder.name}: sweep", page(result), 80)
    except OSError as error:
        raise UserError(f"cannot write --out={out}: {error.strerror}") from None
    print(f"written: {out}")


def _values(result: Mapping[str, Any], point: Mapping[str, Any]) -> list[str]:
    values = point["values"]
    return [text_of(values[name]) if name in values else "–" for name in result["fields"]]


def _done(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [point for point in result["points"] if point.get("test")]


def _headline(done: Sequence[Mapping[str, Any]]):
    """What the points are ranked by; bits per byte as long as none is finished."""
    return headline_of(done[0]["test"]) if done else HEADLINES[0]
