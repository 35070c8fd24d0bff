"""What convolutions over three tokens are worth to attention: results.json.

python experiments/rcmha/measure.py

Trains small byte models with as many parameters, on the same rows of text with the same number of
steps, and scores each on the same held-out bytes.
"""

import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
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
    "model.width": 96,
    "model.layers": 2,
    "model.heads": 3,
    "model.kv_heads": 3,
    "model.head_dim": 32,
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup": 20,
    "train.steps": 300,
}
HIDDEN = {"convolutional": 255, "softmax": 256}
"""Units of an MLP: one of 3 x 96 weights stands for three convolutions of 3 x 32."""
SEEDS = (0, 1)
SCORED = 32768  # tokens of the validation split
NAMES = {
    "RCMHA": ("convolutional", "transformer_xl"),
    "RMHA": ("softmax", "transformer_xl"),
    "MDHA": ("convolutional", "absolute"),
    "MHA": ("softmax", "absolute"),
}


def config_of(name: str, seed: int, changes: dict[str, Any]) -> ConfigDict:
    attention, position = NAMES[name]
    config = base(attention, position=position)
    sizes = SIZES | {"model.mlp_width": HIDDEN[attention], "seed": seed} | changes
    for path, value in sizes.items():
        override(config, path, str(value))
    return config


def measure(name: str, seeds: tuple[int, ...], changes: dict[str, Any]) -> dict[str, Any]:
    """Bits per held-out byte after training, for each seed, and the number of parameters."""
    start, found, step, parameters = time.process_time(), [], None, 0
    for seed in seeds:
        config = config_of(name, seed, changes)
        task = tasks.build(config.task, seed=seed)
        model = model_of(config, task.vocab_size)
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        # An array that stands at two places, as zeros may, could not be donated twice.
        state = jax.tree.map(jnp.copy, init_state(model, optimizer, config))
        step = step or jax.jit(make_step(model, optimizer, config), donate_argnums=0)
        for number in range(config.train.steps):
            state, _ = step(state, task.batch(number))
        length = config.task.length
        options = {"length": length, "stride": length, "batch": 4096 // length, "tokens": SCORED}
        scores = score(model, state.params, task, "validation", **options)
        found.append(round(scores.summary()["bits_per_byte"], 4))
        parameters = sum(z.size for z in jax.tree.leaves(state.params))
    print(name, found, parameters, f"{time.process_time() - start:.0f} s", flush=True)
    return {"bits_per_byte": found, "parameters": parameters}


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def held(claim: dict[str, Any], found: dict[str, dict[str, Any]]) -> bool:
    """Whether a claim of expected.json is what was measured: in the mean over the seeds, and at
    equal parameters where it says so."""
    low, high = claim["above_by"]
    a, b = found[claim["what"]], found[claim["than"]]
    fair = a["parameters"] == b["parameters"] or not claim["equal_parameters"]
    return fair and low <= mean(a["bits_per_byte"]) - mean(b["bits_per_byte"]) <= high


def main() -> None:
    if sys.argv[1:] == ["small"]:
        print({name: measure(name, (0,), {"train.steps": 2}) for name in NAMES})
        return
    found = {name: measure(name, SEEDS, {}) for name in NAMES}
    results: dict[str, Any] = {
        "command": "python experiments/rcmha/measure.py",
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "sizes": SIZES | {"model.mlp_width": HIDDEN, "seeds": SEEDS, "evaluated tokens": SCORED},
        "models": found,
    }
    claims = json.loads(EXPECTED.read_text(encoding="utf-8"))["claims"]
    results["held"] = {f"{c['what']} against {c['than']}": held(c, found) for c in claims}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(results["held"], indent=1))


if __name__ == "__main__":
    main()
