"""The tasks of the Long Range Arena, each learnt by a few mechanisms on a CPU: results.json.

python experiments/long_range_arena/measure.py [TASK/MECHANISM ...]

Every cell is one run of configs/lra.py at size=small, below runs/long_range_arena; the same command
goes on where it was stopped (its time then counts from there). Images have absolute positions.
Without names, all cells that are not recorded yet. Each is written down as it comes; what lies
outside the bands of expected.json is printed, and the tables of README.md are written anew.
"""

import json
import os
import platform
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from attnlab import tasks
from attnlab.main import main as attnlab
from attnlab.overrides import load
from attnlab.tasks.listops import baselines

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS, EXPECTED, README = (HERE / n for n in ("results.json", "expected.json", "README.md"))
TASKS = ("listops", "text_classification", "retrieval", "image", "pathfinder")
MECHANISMS = ("softmax", "window", "linear")
GUESSES = {
    "guess": "guess",
    "root": "guess, root operator known",
    "shallow": "guess, its own digits too",
}


def measure(cell: str) -> dict[str, Any]:
    """Trains a cell, or goes on with it, and reads what it left."""
    task, mechanism = cell.split("/")
    position = "absolute" if task == "image" else "rope"
    spec = f"configs/lra.py:task={task},attention={mechanism},position={position},size=small"
    workdir = Path("runs") / "long_range_arena" / f"{task}-{mechanism}"
    command = ["train", f"--config={spec}", f"--workdir={workdir}"]
    begun = time.process_time()
    if code := attnlab(command):
        raise SystemExit(code)
    seconds = time.process_time() - begun
    test = json.loads((workdir / "test.json").read_text(encoding="utf-8"))
    config = load(spec)
    return {
        "command": " ".join(["attnlab", *command]),
        "accuracy": round(test["accuracy"], 4),
        "accuracy_95": [round(x, 4) for x in test["accuracy_95"]],
        "test_rows": test["rows"],
        **guesses(config),
        "steps": config.train.steps,
        "length": config.task.length,
        "processor_minutes": round(seconds / 60, 1),
        "hardware": f"{len(os.sched_getaffinity(0))} CPU core(s), {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
    }


def guesses(config: Any) -> dict[str, float]:
    """The share of test rows that has the class which is the commonest in 1,000 rows of train:
    ``guess``; of an expression also of those that begin with the same operator, ``root``, and have
    its digits too, ``shallow``."""
    task: Any = tasks.build(config.task, seed=config.seed)
    rows = range(min(1000, task.size("test") or 1000))
    if config.task.name == "listops":
        rows = range(20_000)
    train, test = (task.draw(split, 0, rows, config.task.length) for split in ("train", "test"))
    if config.task.name == "listops":
        found = baselines(train, test)
        found["guess"] = found.pop("majority")
        return {name: round(share, 4) for name, share in found.items()}
    counts = [(train["targets"] == label).sum() for label in range(task.classes)]
    share = float((test["targets"] == counts.index(max(counts))).mean())
    return {"guess": round(share, 4)}


def outside(runs: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """What is not in its band; a run without one is not, either."""
    said = []
    for cell, run in runs.items():
        low, high = expected["accuracy"].get(cell, (0, 0))
        if not low <= run["accuracy"] <= high:
            said.append(f"{cell}: {run['accuracy']} not in {low}..{high}")
    return said


def tables(runs: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """What stands between the marks of README.md: ours, and the figures of the paper."""
    lines = [
        f"| size=small | {' | '.join(TASKS)} |",
        "| --- " * (len(TASKS) + 1) + "|",
        *(
            f"| {what} | " + " | ".join(_share(runs, t, field) for t in TASKS) + " |"
            for field, what in GUESSES.items()
        ),
    ]
    for mechanism in MECHANISMS:
        cells = (_share(runs, f"{task}/{mechanism}", "accuracy") for task in TASKS)
        lines.append(f"| `{mechanism}` | {' | '.join(cells)} |")
    lines += ["", f"| published | {' | '.join(TASKS)} |", "| --- " * (len(TASKS) + 1) + "|"]
    for model, row in expected["published"].items():
        lines.append(f"| {model} | {' | '.join(f'{x:.2f}' for x in row)} |")
    return "\n".join(lines)


def _share(runs: Mapping[str, Any], cell: str, field: str) -> str:
    """A share in per cent: of a cell, or of the first one of a task that was run."""
    found = [run for name, run in runs.items() if name == cell or name.startswith(f"{cell}/")]
    if not found:
        return "" if field in ("root", "shallow") and cell != "listops" else "not run"
    return f"{100 * found[0][field]:.1f}" if field in found[0] else ""


def written(text: str, runs: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """README.md with its tables anew."""
    marks = re.compile(r"(<!-- tables -->\n).*?(<!-- /tables -->)", re.DOTALL)
    return marks.sub(lambda m: f"{m[1]}{tables(runs, expected)}\n{m[2]}", text)


def main(cells: Sequence[str]) -> None:
    os.chdir(ROOT)
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"runs": {}}
    every = [f"{task}/{mechanism}" for task in TASKS for mechanism in MECHANISMS]
    for cell in cells or [cell for cell in every if cell not in results["runs"]]:
        results["runs"][cell] = measure(cell)
        print(cell, results["runs"][cell], flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        text = README.read_text(encoding="utf-8")
        README.write_text(written(text, results["runs"], expected), encoding="utf-8")
    print("\n".join(outside(results["runs"], expected)) or "as expected")


if __name__ == "__main__":
    main(sys.argv[1:])
