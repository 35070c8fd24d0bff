"""Trains on haystacks of up to 512 tokens and asks in haystacks of up to 8,192: results.json.

python experiments/needle/measure.py [NAME...]

A name is that of a model below; all of them by default. Every batch has as many tokens, and rows
grow while a model learns: to compare a key with all others is learnt in minutes from rows of 64
tokens and not in an hour from rows of 512. A few minutes a model on one CPU core.
"""

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from attnlab import tasks
from attnlab.answers import score_answers
from attnlab.config import base, model_of
from attnlab.files import read_json, write_json
from attnlab.growing import train_growing
from attnlab.overrides import override

RESULTS = Path(__file__).with_name("results.json")
TRAINED, LONGEST = 512, 8192
GROWTH = ((64, 400), (128, 100), (256, 100), (512, 200))
"""Tokens of a row and steps with rows of so many."""
TOKENS = 4096  # a batch
SIZES = {
    "task.keys": 8,
    "task.queries": 8,
    "model.width": 64,
    "model.layers": 2,
    "model.heads": 1,
    "model.kv_heads": 1,
    "model.tied": False,
    "optimizer.warmup": 50,
    "optimizer.learning_rate": 3e-3,
    "attention.window.window": 4,
}
"""The first layer sees four tokens, and so the one before; the second is one of `MODELS`."""


class Model(NamedTuple):
    """What differs from `SIZES`: positions, the normaliser, options, which attention stands behind
    the window, and which options it has when it is asked in place of those it was trained with."""

    position: str
    normaliser: str
    options: dict[str, Any]
    attention: str = "softmax"
    asked_with: dict[str, Any] | None = None


LOG_N = {"normaliser.length": TRAINED}
BLOCKS = {"attention.landmark.block": 4, "attention.landmark.chosen": TRAINED // 4}
MODELS = {
    "rope": Model("rope", "softmax", {}),
    "rope, log_n": Model("rope", "log_n", LOG_N),
    "alibi": Model("alibi", "softmax", {}),
    "none, log_n": Model("none", "log_n", LOG_N),
    "landmark, 4 blocks": Model(
        "none", "softmax", BLOCKS, "landmark", {"attention.landmark.chosen": 4}
    ),
}
ROWS = 256  # at every length, down to 32 at the longest


def config_of(name: str) -> ConfigDict:
    chosen = MODELS[name]
    attention = f"window+{chosen.attention}"
    config = base(attention, chosen.position, task="needle", normaliser=chosen.normaliser)
    for path, value in (SIZES | chosen.options).items():
        override(config, path, str(value))
    return config


def measure(name: str) -> dict[str, Any]:
    """How the model learnt, and what it found, by length and depth."""
    config, begun = config_of(name), time.process_time()
    model, params, curve = train_growing(config, GROWTH, TOKENS)
    trained = time.process_time() - begun
    task: Any = tasks.build(config.task, seed=config.seed)
    if asked_with := MODELS[name].asked_with:
        for path, value in asked_with.items():
            override(config, path, str(value))
        model = model_of(config, task.vocab_size)
    lengths, length = {}, GROWTH[0][0]
    while length <= LONGEST:
        rows = min(ROWS, max(32, ROWS * 1024 // length))
        config.evaluate.batch = max(1, min(32, TOKENS * 4 // length))
        options = {"length": length, "tokens": rows * length}
        found = score_answers(model, params, task, config, "test", config.train.steps, **options)
        kept = ("accuracy", "accuracy_95", "rows", "asked", "by_depth")
        lengths[str(length)] = {key: found[key] for key in kept}
        print(f"  {name}, {length} tokens: {found['accuracy']:.3f}", flush=True)
        length *= 2
    return {"curve": curve, "processor_seconds_of_training": round(trained), "lengths": lengths}


def held(claim: dict, rows: dict[str, dict]) -> bool:
    """Whether a claim of expected.json is what was measured."""
    low, high = claim["accuracy"]
    return low <= rows[claim["model"]]["lengths"][str(claim["length"])]["accuracy"] <= high


def main(names: list[str]) -> None:
    rows = read_json(RESULTS)["rows"] if RESULTS.is_file() else {}
    for name in names or MODELS:
        rows[name] = measure(name)
        about = {
            "command": "python experiments/needle/measure.py",
            "hardware": f"{len(os.sched_getaffinity(0))} CPU core(s), {platform.machine()}",
            "versions": {"python": platform.python_version(), "jax": jax.__version__},
            "sizes": SIZES | {"growth": GROWTH, "tokens of a batch": TOKENS, "seed": 0},
        }
        write_json(RESULTS, about | {"rows": rows})
        accuracies = {n: each["accuracy"] for n, each in rows[name]["lengths"].items()}
        print(name, json.dumps(accuracies), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
