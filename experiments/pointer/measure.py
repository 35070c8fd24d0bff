"""Trains small pointer networks to name hulls, tours and triangles: results.json.

python experiments/pointer/measure.py [RUN ...]

On one core; every run is written down when it is done. Prints the claims of expected.json that do
not hold.
"""

import json
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from attnlab import tasks
from attnlab.config import architecture_of, pointer_of
from attnlab.encoders import LstmEncoder
from attnlab.optimizer import make_optimizer
from attnlab.overrides import load, override
from attnlab.pointer import PointerNetwork
from attnlab.pointing import score_named
from attnlab.step import init_state, make_step

HERE = Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "pointer.py"
RESULTS, EXPECTED = HERE / "results.json", HERE / "expected.json"
FEWEST = 5  # points of a row
SCORED = 1000  # rows of the test split of each number of points


class Run(NamedTuple):
    """What differs from configs/pointer.py, whether an LSTM reads the points, as in the paper, the
    task, and the most points of a scored row."""

    lstm: bool
    changes: dict[str, Any]
    task: str = "hull"
    most: int = 20


LSTM = {"model.width": 96, "optimizer.learning_rate": 3e-3}
RUNS = {
    "lstm, 5 points": Run(True, {**LSTM, "task.length": 5, "train.steps": 4000}),
    "lstm, 5 to 10": Run(True, {**LSTM, "train.steps": 8000}),
    "softmax, 5 to 10": Run(False, {}),
    "softmax, tour of 5 to 10": Run(False, {}, "tsp", 12),
    "softmax, triangles of 5 to 10": Run(False, {}, "delaunay", 12),
}


def config_of(run: Run) -> ConfigDict:
    config = load(f"{CONFIG}:task={run.task}")
    for path, value in run.changes.items():
        override(config, path, str(value))
    return config


def model_of(run: Run, config: ConfigDict, recipe: Any) -> PointerNetwork:
    if run.lstm:
        return PointerNetwork(LstmEncoder(architecture_of(config)), recipe)
    return pointer_of(config, recipe)


def measure(run: Run) -> dict:
    """Scores by the number of points, how many parameters, and how long it took."""
    config, start = config_of(run), time.process_time()
    task: Any = tasks.build(config.task, seed=0)
    model = model_of(run, config, task.recipe)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = init_state(model, optimizer, config)
    step = jax.jit(make_step(model, optimizer, config), donate_argnums=0)
    for number, batch in zip(range(config.train.steps), task.batches()):
        state, metrics = step(state, batch)
        if number % 500 == 0:
            print(f"  step {number}: {float(metrics['loss']):.3f} nats", flush=True)
    trained = time.process_time() - start
    options = {"length": run.most, "tokens": run.most * SCORED * (run.most - FEWEST + 1)}
    found = score_named(model, state.params, task, config, "test", config.train.steps, **options)
    return {
        "task": run.task,
        "changes": run.changes,
        "steps": config.train.steps,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "processor seconds of training": round(trained),
        "by_points": found["by_points"],
        "examples": found["examples"],
    }


def at(result: dict, points: int) -> dict:
    """The scores of rows of so many points."""
    return next(row for row in result["by_points"] if row["points"] == points)


def held(claim: dict, runs: dict) -> bool:
    """Whether a claim of expected.json is what was measured."""
    found = at(runs[claim["run"]], claim["points"])[claim["measure"]]
    if "above" in claim:
        return found > at(runs[claim["above"]], claim["points"])[claim["measure"]]
    low, high = claim["band"]
    return found is not None and low <= found <= high


def main(names: Sequence[str]) -> None:
    results: dict[str, Any] = {"models": {}}
    if RESULTS.exists():
        results |= json.loads(RESULTS.read_text(encoding="utf-8"))
    results |= {
        "command": "python experiments/pointer/measure.py",
        "hardware": f"1 CPU core, {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "config": "configs/pointer.py",
        "scored rows": f"{SCORED} of each number of points",
    }
    for name in names or RUNS:
        print(name, flush=True)
        found = results["models"][name] = measure(RUNS[name])
        print({key: value for key, value in found.items() if key != "examples"}, flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    claims = json.loads(EXPECTED.read_text(encoding="utf-8"))["claims"]
    print("\n".join(c["what"] for c in claims if not held(c, results["models"])) or "as expected")


if __name__ == "__main__":
    main(sys.argv[1:])
