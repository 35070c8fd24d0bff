"""Trains small models to regress in context and measures their error by the examples seen:
results.json.

python experiments/in_context_regression/measure.py

Every model is that of configs/regression.py with another attention and sees the same rows.
"""

import json
import os
import platform
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from attnlab import tasks
from attnlab.config import regressor_of
from attnlab.in_context import ORACLES, score_examples
from attnlab.optimizer import make_optimizer
from attnlab.overrides import load
from attnlab.step import init_state, make_step

HERE = Path(__file__).parent
RESULTS, EXPECTED = HERE / "results.json", HERE / "expected.json"
CONFIG = HERE.parents[1] / "configs" / "regression.py"
TRAINED = ("softmax",)
ROWS = 4096  # of the test split


def trained(config: ConfigDict, task):
    """The model of a config and its parameters after ``train.steps`` steps."""
    model = regressor_of(config, task.recipe.features)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = init_state(model, optimizer, config)
    step = jax.jit(make_step(model, optimizer, config), donate_argnums=0)
    for number in range(config.train.steps):
        state, metrics = step(state, task.batch(number))
        assert metrics["finite"], f"{config.attention.name}: step {number} is not finite"
        if number % 200 == 0:
            print(config.attention.name, number, f"{metrics['loss']:.4f}", flush=True)
    return model, state.params


def measure() -> dict:
    models = {}
    for name in TRAINED:
        config = load(f"{CONFIG}:attention={name}")
        task = tasks.build(config.task, seed=config.seed)
        start = time.monotonic()
        model, params = trained(config, task)
        seconds = time.monotonic() - start
        tokens = ROWS * config.task.length
        found = score_examples(model, params, task, config, "test", 0, tokens=tokens)
        models[name] = {
            "seconds": round(seconds),
            "normalised_squared_error": round(found["normalised_squared_error"], 4),
            "oracles": {key: round(value, 4) for key, value in found["oracles"].items()},
            "by_examples": [
                {"examples": row["low"]} | {key: round(row[key], 5) for key in ("model", *ORACLES)}
                for row in found["by_examples"]
            ],
        }
        print(name, models[name]["normalised_squared_error"], f"{seconds:.0f} s", flush=True)
    return models


def held(claim: dict, models: dict) -> bool:
    """Whether a claim of expected.json is what was measured: the squared error of a model after so
    many examples over that of an oracle lies in a band."""
    row = next(
        row for row in models[claim["model"]]["by_examples"] if row["examples"] == claim["examples"]
    )
    low, high = claim["ratio"]
    return low <= row["model"] / row[claim["to"]] <= high


def main() -> None:
    models = measure()
    config = load(str(CONFIG))
    about = {
        "command": "python experiments/in_context_regression/measure.py",
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "sizes": {
            "task": config.task.to_dict(),
            "model": {key: config.model[key] for key in ("width", "layers", "heads")},
            "position": config.position.name,
            "steps": config.train.steps,
            "learning_rate": config.optimizer.learning_rate,
            "scored rows": ROWS,
            "seed": config.seed,
        },
    }
    claims = json.loads(EXPECTED.read_text(encoding="utf-8"))["claims"]
    results = about | {"held": {c["what"]: held(c, models) for c in claims}, "models": models}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
