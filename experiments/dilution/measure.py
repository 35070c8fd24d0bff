"""The weight of one key that matters among n, under every normaliser: results.json.

python experiments/dilution/measure.py

The sweep of `attnlab dilution`, with what the equations say beside it; prints what lies outside the
bands of expected.json.
"""

import json
import platform
from pathlib import Path

import jax

from attnlab.analysis.margins import sweep

HERE = Path(__file__).parent
KEPT = ("normaliser", "margin", "noise", "n", "samples", "signal", "expected", "support", "leading")


def measure() -> dict:
    rows = [{name: _short(row[name]) for name in KEPT} for row in sweep(samples=32, seed=0)]
    return {
        "command": "python experiments/dilution/measure.py",
        "hardware": "any: the numbers do not depend on it",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "rows": rows,
    }


def outside(rows: list[dict], bands: list[dict]) -> list[str]:
    """What is not as expected: measured values off the bands, and closed forms off what they
    describe."""
    said = []
    for band in bands:
        where, (low, high) = band["where"], band["band"]
        for row in rows:
            here = all(row[name] == value for name, value in where.items())
            if here and not low <= row[band["value"]] <= high:
                said.append(f"{where}: {band['value']} {row[band['value']]} not in {low}..{high}")
    for row in rows:
        if row["noise"] == 0 and abs(row["signal"] - row["expected"]) > 1e-5:
            said.append(f"{row}: not the closed form")
    return said


def _short(value):
    return float(f"{value:.6g}") if isinstance(value, float) else value


def main() -> None:
    result = measure()
    text = json.dumps(result, indent=1).replace("\n   ", "").replace("\n  }", "}")
    (HERE / "results.json").write_text(text + "\n", encoding="utf-8")
    expected = json.loads((HERE / "expected.json").read_text(encoding="utf-8"))
    print("\n".join(outside(result["rows"], expected["bands"])) or "as expected")


if __name__ == "__main__":
    main()
