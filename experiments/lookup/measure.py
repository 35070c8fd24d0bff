"""What can be looked up, by normaliser and by mechanism: results.json.

python experiments/lookup/measure.py [needle] [far] [majority]

Writes down each number as it comes; prints what lies outside the bands of expected.json.
"""

import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import far
import jax
import majority
import needle

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
MEASURES = {"needle": needle.measure, "far": far.measure_all, "majority": majority.measure}


def outside(results: dict, expected: dict) -> list[str]:
    """What is not in its band."""
    said = []
    for part in ("far", "majority"):
        for label, (low, high) in expected[part].items():
            found = results[part].get(label)
            if found is None or not low <= found <= high:
                said.append(f"{part}: {label} {found} not in {low}..{high}")
    for part, lesser, greater in expected["order"]:
        found = [_value(results[part][label]) for label in (lesser, greater)]
        if found[0] > found[1]:
            said.append(f"{part}: {lesser} {found[0]} above {greater} {found[1]}")
    for label, bands in expected["needle"].items():
        for length, (low, high) in bands.items():
            rows = results["needle"].get(label, ())
            found = next((row["weight"] for row in rows if row["n"] == int(length)), None)
            if found is None or not low <= found <= high:
                said.append(f"needle: {label}, n={length}: {found} not in {low}..{high}")
    return said


def _value(found: Any) -> float:
    """The share recalled, or the weight of the needle among the most keys."""
    return found[-1]["weight"] if isinstance(found, list) else found


def main(parts: Sequence[str]) -> None:
    results: dict[str, Any] = {part: {} for part in MEASURES}
    if RESULTS.exists():
        results |= json.loads(RESULTS.read_text(encoding="utf-8"))
    results["command"] = "python experiments/lookup/measure.py"
    results["hardware"] = f"{len(os.sched_getaffinity(0))} CPU cores, {platform.machine()}"
    results["versions"] = {"python": platform.python_version(), "jax": jax.__version__}
    for part in parts or MEASURES:
        for label, found in MEASURES[part]():
            print(part, label, found, flush=True)
            results[part][label] = found
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    expected = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))
    print("\n".join(outside(results, expected)) or "as expected")


if __name__ == "__main__":
    main(sys.argv[1:])
