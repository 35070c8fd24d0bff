"""Trains small models to regress in context, one mechanism after the other: results.json.

python experiments/in_context_regression/measure.py [MECHANISM ...]

Each is configs/regression.py with that mechanism, below runs/in_context_regression; the same
command goes on where it was stopped. Prints the claims of expected.json that do not hold.
"""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from attnlab.main import main as attnlab

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS, EXPECTED = HERE / "results.json", HERE / "expected.json"
OPTIONS = {
    "softmax": (),
    "window": ("--config.attention.window=32",),
    "linear": (),
    "delta": (),
    "gated_delta": (),
}
"""The mechanisms, and what is set beside; 32 tokens are 16 examples."""


def measure(name: str) -> dict[str, Any]:
    """Trains a model, or goes on with it, and reads how it was scored."""
    workdir = Path("runs") / "in_context_regression" / name
    spec = f"--config=configs/regression.py:attention={name}"
    command = ["train", spec, *OPTIONS[name], f"--workdir={workdir}"]
    if code := attnlab(command):
        raise SystemExit(code)
    test = json.loads((workdir / "test.json").read_text(encoding="utf-8"))
    rows = ("model", "least_squares", "ridge")
    return {
        "command": " ".join(["attnlab", *command]),
        "steps": test["step"],
        "test_rows": test["rows"],
        "normalised_squared_error": round(test["normalised_squared_error"], 4),
        "normalised_squared_error_95": [round(x, 4) for x in test["normalised_squared_error_95"]],
        "by_examples": [
            {"examples": row["low"], **{key: round(row[key], 4) for key in rows}}
            for row in test["by_examples"]
        ],
    }


def error(result: Mapping[str, Any], examples: int, of: str = "model") -> float:
    """The squared error of the answers that follow so many examples."""
    return next(row[of] for row in result["by_examples"] if row["examples"] == examples)


def held(claim: Mapping[str, Any], models: Mapping[str, Any]) -> bool:
    """Whether a claim of expected.json is what was measured."""
    examples = claim["examples"]
    found = error(models[claim["model"]], examples)
    if "below" in claim:
        return found < claim.get("factor", 1) * error(models[claim["below"]], examples)
    low, high = claim["band"]
    return low <= found <= high


def main(names: Sequence[str]) -> None:
    os.chdir(ROOT)
    results: dict[str, Any] = {"models": {}}
    if RESULTS.exists():
        results |= json.loads(RESULTS.read_text(encoding="utf-8"))
    results |= {
        "command": "python experiments/in_context_regression/measure.py",
        "hardware": f"{len(os.sched_getaffinity(0))} CPU core(s), {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }
    for name in names or OPTIONS:
        found = results["models"][name] = measure(name)
        print(name, found["normalised_squared_error"], flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    claims = json.loads(EXPECTED.read_text(encoding="utf-8"))["claims"]
    print("\n".join(c["what"] for c in claims if not held(c, results["models"])) or "as expected")


if __name__ == "__main__":
    main(sys.argv[1:])
