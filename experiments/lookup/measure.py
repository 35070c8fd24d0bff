"""What can be looked up, by normaliser and by mechanism: results.json.

python experiments/lookup/measure.py

Prints what lies outside the bands of expected.json.
"""

import json
import platform
from pathlib import Path

import far
import jax
import needle

HERE = Path(__file__).parent


def outside(results: dict, expected: dict) -> list[str]:
    """What is not in its band."""
    said = []
    for label, (low, high) in expected["far"].items():
        found = results["far"].get(label)
        if found is None or not low <= found <= high:
            said.append(f"far: {label} {found} not in {low}..{high}")
    for label, bands in expected["needle"].items():
        for length, (low, high) in bands.items():
            row = next(row for row in results["needle"][label] if row["n"] == int(length))
            if not low <= row["weight"] <= high:
                said.append(f"needle: {label}, n={length}: {row['weight']} not in {low}..{high}")
    return said


def main() -> None:
    results = {
        "command": "python experiments/lookup/measure.py",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "needle": needle.measure(),
        "far": far.measure_all(),
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    expected = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))
    print("\n".join(outside(results, expected)) or "as expected")


if __name__ == "__main__":
    main()
