"""Trains small models on multi-query associative recall and asks what fits in their states:
results.json.

python experiments/mqar/measure.py [NAME...]

A name is that of a mechanism; all of them by default. Points that stand in results.json already
are not measured again: delete their rows to do so. Half an hour on one CPU core.
"""

import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from attnlab import tasks
from attnlab.answers import score_answers
from attnlab.config import base, model_of
from attnlab.files import read_json, write_json
from attnlab.model import Transformer, initial_memory
from attnlab.optimizer import make_optimizer
from attnlab.overrides import override
from attnlab.step import init_state, make_step

RESULTS = Path(__file__).with_name("results.json")
FIRST = 4
"""The window of the first layer, in tokens: it sees the token before, as the short convolutions of
recurrent models do. The second layer is under test. A ``window`` is both layers."""
SIZES = {
    "task.length": 64,
    "task.batch": 64,
    "task.vocab": 256,
    "task.power": 1.0,
    "model.width": 64,
    "model.layers": 2,
    "model.mlp": "none",
    "model.tied": False,
    "optimizer.warmup": 50,
    "train.steps": 1000,
    "evaluate.batch": 128,
}
RATES = (1e-2, 3e-3)
"""Learning rates, of which the better one counts."""
LOOK_EVERY = 100
TESTED = 256  # rows
ENOUGH, GOOD = 0.99, 0.9
"""Held-out accuracy at which training may stop, and at which no other rate is tried."""


HEADS = {
    4: {"softmax": (1,), "linear": (1, 4, 16), "delta": (1, 4)},
    8: {"softmax": (1,), "linear": (1, 4), "delta": (1,)},
}


def points() -> Iterator[dict[str, Any]]:
    """Pairs, mechanism and heads: H heads of 64 / H columns share one width, so that all models
    have as many parameters, and a state of 64 x 64 / H numbers."""
    for pairs, mechanisms in HEADS.items():
        for name, heads in mechanisms.items():
            for number in heads:
                yield {"attention": name, "pairs": pairs, "heads": number}
    yield {"attention": "window", "pairs": 4, "heads": 1, "window": 8}
    yield {"attention": "dynamic_mask", "pairs": 4, "heads": 1, "kept": 8}


def config_of(point: dict[str, Any], rate: float) -> ConfigDict:
    name, reach, kept = point["attention"], point.get("window"), point.get("kept")
    config = base("window" if reach else f"window+{name}", "absolute", task="mqar")
    fields = SIZES | {"task.pairs": point["pairs"], "optimizer.learning_rate": rate}
    fields |= dict.fromkeys(("model.heads", "model.kv_heads"), point["heads"])
    fields |= {"attention.window": reach} if reach else {"attention.window.window": FIRST}
    fields |= {f"attention.{name}.kept": kept} if kept else {}
    for path, value in fields.items():
        override(config, path, str(value))
    return config


def state_bytes(model: Transformer, length: int) -> int:
    """What the second layer remembers of a sequence of so many tokens."""
    memory = jax.eval_shape(lambda: initial_memory(model.architecture, model.mechanisms, 1, length))
    return sum(z.size * z.dtype.itemsize for z in jax.tree.leaves(memory[1]))


def train(config: ConfigDict) -> tuple[Transformer, Any, list[list[float]]]:
    """The model, its parameters, and (step, accuracy) on the way."""
    task = tasks.build(config.task, seed=config.seed)
    model = model_of(config, task.vocab_size)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = init_state(model, optimizer, config)
    step = jax.jit(make_step(model, optimizer, config), donate_argnums=0)
    curve = []
    for number in range(1, config.train.steps + 1):
        state, _ = step(state, task.batch(number - 1))
        if number % LOOK_EVERY == 0:
            found = accuracy(config, model, state.params, task, "validation", number)
            curve.append([number, round(found["accuracy"], 4)])
            if found["accuracy"] >= ENOUGH:
                break
    return model, state.params, curve


def accuracy(config, model, params, task, split: str, step: int) -> dict[str, Any]:
    tokens = TESTED * config.task.length
    return score_answers(model, params, task, config, split, step, tokens=tokens)


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """The row of a point: by rate the curve and the accuracy on the test split."""
    row: dict[str, Any] = point | {"accuracy": 0.0, "rates": {}}
    for rate in RATES:
        begun = time.process_time()
        config = config_of(point, rate)
        model, params, curve = train(config)
        task = tasks.build(config.task, seed=config.seed)
        found = accuracy(config, model, params, task, "test", curve[-1][0])
        row["state_bytes"] = state_bytes(model, config.task.length)
        row["parameters"] = sum(z.size for z in jax.tree.leaves(params))
        row["rates"][str(rate)] = {
            "accuracy": round(found["accuracy"], 4),
            "accuracy_95": [round(x, 4) for x in found["accuracy_95"]],
            "curve": curve,
            "processor_seconds": round(time.process_time() - begun),
        }
        row["accuracy"] = max(row["accuracy"], round(found["accuracy"], 4))
        print(title(point), rate, curve[-1], round(time.process_time() - begun), "s", flush=True)
        if row["accuracy"] >= GOOD:
            break
    return row


def title(point: dict[str, Any]) -> str:
    size = point.get("window") or point.get("kept")
    reach = f" {size}" if size else ""
    return f"{point['attention']}{reach}, {point['pairs']} pairs, {point['heads']} heads"


def held(claim: dict, rows: dict[str, dict]) -> bool:
    """Whether a claim of expected.json is what was measured."""
    low, high = claim["accuracy"]
    return all(low <= rows[name]["accuracy"] <= high for name in claim["of"])


def main(names: list[str]) -> None:
    rows = read_json(RESULTS)["rows"] if RESULTS.is_file() else {}
    for point in points():
        if (names and point["attention"] not in names) or title(point) in rows:
            continue
        rows[title(point)] = measure(point)
        sizes = SIZES | {"window of the first layer": FIRST, "learning rates": RATES}
        about = {
            "command": "python experiments/mqar/measure.py",
            "hardware": f"{len(os.sched_getaffinity(0))} CPU core(s), {platform.machine()}",
            "versions": {"python": platform.python_version(), "jax": jax.__version__},
            "sizes": sizes | {"tested rows": TESTED, "seed": 0},
        }
        write_json(RESULTS, about | {"rows": rows})


if __name__ == "__main__":
    main(sys.argv[1:])
