"""What `attnlab bench` measured, gathered in results.json and results.md.

python experiments/benchmarks/record.py runs/bench/*/bench.jsonl

Files are given in full: what an earlier call recorded is replaced, unless its results.json is given
too, first. Where a point was measured again, the last time counts.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnlab.bench.tables import failures, markdown, tables, title

FOLDER = Path(__file__).parent
RESULTS, TABLES = FOLDER / "results.json", FOLDER / "results.md"
EXPECTED = FOLDER / "expected.json"
NAME = ("mode", "machine", "threads", "label", "peer_of", "position", "length", "dtype")
KEPT = (
    *NAME,
    "device",
    "versions",
    "git",
    "command",
    "compiling",
    "wall",
    "cpu",
    "ours_by_theirs_wall",
    "ours_by_theirs_cpu",
    "tokens_per_second",
    "flops",
    "rate",
    "ceiling",
    "state",
    "peak",
    "above_empty",
    "error",
)

Row = dict[str, Any]


def gather(paths: Sequence[str | Path]) -> list[Row]:
    """One row for each point, in the order of the files."""
    found: dict[tuple, Row] = {}
    for path in paths:
        for row in rows_of(Path(path)):
            kept = {key: value for key, value in row.items() if key in KEPT}
            found[tuple(row.get(key) for key in NAME)] = kept
    return list(found.values())


def rows_of(path: Path) -> list[Row]:
    """Those of a bench.jsonl, one a line, or of a results.json."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in text.splitlines()]
    return json.loads(text)


def written(rows: Sequence[Row]) -> str:
    """Markdown: the tables of each mode, device and number of threads."""
    kinds = dict.fromkeys((row["mode"], row["machine"], row["threads"]) for row in rows)
    text = ["Written by `record.py` from results.json."]
    for kind in kinds:
        mine = [row for row in rows if (row["mode"], row["machine"], row["threads"]) == kind]
        text += [f"## {title(mine)}", *map(markdown, tables(mine)), *failures(mine)]
    return "\n\n".join(text) + "\n"


def outside(rows: Sequence[Row], bands: Sequence[Row]) -> list[str]:
    """The ratios that are not in their band of expected.json, or were not measured."""
    missed = []
    for band in bands:
        mine = [row for row in rows if all(row.get(k) == v for k, v in band["of"].items())]
        kind = f"ours_by_theirs_{band['time']}"
        values = [row[kind]["median"] for row in mine if kind in row]
        if len(values) != 1 or not values[0] <= band["at_most"]:
            missed.append(f"{band}: measured {values}")
    return missed


if __name__ == "__main__":
    measured = gather(sys.argv[1:])
    RESULTS.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    TABLES.write_text(written(measured), encoding="utf-8")
    for line in outside(measured, json.loads(EXPECTED.read_text(encoding="utf-8"))):
        print("outside:", line)
