"""What attention loses without mixing, without softmax, without queries and keys of hidden states:
results.json.

python experiments/deconstructed/measure.py

Trains one small byte model per variant and seed, in all layers and in turn with softmax, on the
same rows of text with the same number of steps, and scores each on the same held-out bytes.
"""

import json
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
from attnlab.config import base, model_of
from attnlab.evaluate import score
from attnlab.optimizer import make_optimizer
from attnlab.overrides import override
from attnlab.step import init_state, make_step

HERE = Path(__file__).parent
RESULTS, EXPECTED = HERE / "results.json", HERE / "expected.json"
SIZES = {
    "task.corpus": "kjv",
    "task.length": 128,
    "task.batch": 8,
    "model.width": 64,
    "model.layers": 2,
    "model.head_dim": 16,
    "model.mlp_width": 176,
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup": 20,
    "train.steps": 300,
}
SEEDS = (0, 1)
SCORED = 32768  # tokens of the validation split
VARIANTS = ("softmax", "taylor", "static", "random_positions", "importance", "uniform", "window")
"""``window`` of 1 token: nothing is mixed."""
LAYERS = {"in all layers": "{0}", "in turn with softmax": "{0}+softmax"}


def config_of(variant: str, layers: str, seed: int, changes: dict[str, Any]) -> ConfigDict:
    config = base(LAYERS[layers].format(variant), position="rope")
    for path, value in (SIZES | {"seed": seed} | changes).items():
        override(config, path, str(value))
    if variant == "window":
        name = "attention.window" if layers == "in all layers" else "attention.window.window"
        override(config, name, "1")
    return config


def bits(variant: str, layers: str, seeds: tuple[int, ...], changes: dict) -> list[float]:
    """Bits per held-out byte after training, for each seed."""
    found, step = [], None
    for seed in seeds:
        config = config_of(variant, layers, seed, changes)
        task = tasks.build(config.task, seed=seed)
        model = model_of(config, task.vocab_size)
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        state = init_state(model, optimizer, config)
        step = step or jax.jit(make_step(model, optimizer, config), donate_argnums=0)
        for number in range(config.train.steps):
            state, _ = step(state, task.batch(number))
        length = config.task.length
        options = {"length": length, "stride": length, "batch": 4096 // length, "tokens": SCORED}
        scores = score(model, state.params, task, "validation", **options)
        found.append(round(scores.summary()["bits_per_byte"], 4))
    return found


def cells() -> Iterator[tuple[str, str]]:
    """Variants and where they stand; softmax in turn with itself is softmax."""
    for variant in VARIANTS:
        for layers in LAYERS:
            if variant != "softmax" or layers == "in all layers":
                yield variant, layers


def measure(seeds: tuple[int, ...], changes: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    found: dict[str, dict[str, list[float]]] = {}
    for variant, layers in cells():
        start = time.process_time()
        each = bits(variant, layers, seeds, changes)
        found.setdefault(variant, {})[layers] = each
        print(variant, layers, each, f"{time.process_time() - start:.0f} s", flush=True)
    return found


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def held(claim: dict[str, Any], found: dict[str, dict[str, list[float]]]) -> bool:
    """Whether a claim of expected.json is what was measured, in the mean over the seeds."""
    low, high = claim["above_by"]
    (variant, layers), (other, others) = claim["what"], claim["than"]
    return low <= mean(found[variant][layers]) - mean(found[other][others]) <= high


def main() -> None:
    if sys.argv[1:] == ["small"]:
        print(measure((0,), {"train.steps": 5}))
        return
    found = measure(SEEDS, {})
    results: dict[str, Any] = {
        "command": "python experiments/deconstructed/measure.py",
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "sizes": SIZES | {"seeds": SEEDS, "evaluated tokens": SCORED},
        "bits_per_byte": found,
    }
    claims = json.loads(EXPECTED.read_text(encoding="utf-8"))["claims"]
    results["held"] = {claim["says"]: held(claim, found) for claim in claims}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results["held"], indent=1))


if __name__ == "__main__":
    main()
