"""Trains one small model per position module and scores each on longer windows: results.json.

python experiments/extrapolation/measure.py

Every model sees the same batches. The rotary one is scored a second time with its phases scaled for
longer texts, without further training.
"""

import json
import os
import platform
import time
from pathlib import Path

import jax
from ml_collections import ConfigDict

from attnlab import tasks
from attnlab.config import base, model_of
from attnlab.core import Position, positions
from attnlab.evaluate import score
from attnlab.model import Transformer
from attnlab.optimizer import make_optimizer
from attnlab.overrides import override
from attnlab.step import init_state, make_step

RESULTS = Path(__file__).with_name("results.json")
EXPECTED = Path(__file__).with_name("expected.json")
TRAINED = ("rope", "alibi", "t5", "kerple", "fire", "none", "absolute")
SCALED = {
    "rope, ntk x8": ("ntk", {"factor": 8.0}),
    "rope, yarn x8": ("yarn", {"factor": 8.0, "original": 128}),
    "rope, interpolated x4": ("interpolated", {"factor": 4.0}),
}
"""How the rotary model is read after training: position module and its options."""
LENGTHS = (128, 512, 1024)
SCORED = 32768  # tokens of the validation split
SIZES = {
    "task.corpus": "kjv",
    "task.length": 128,
    "task.batch": 8,
    "model.width": 64,
    "model.layers": 2,
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup": 20,
    "train.steps": 350,
}


def config_of(position: str) -> ConfigDict:
    config = base(position=position)
    for path, value in SIZES.items():
        override(config, path, str(value))
    return config


def trained(config: ConfigDict, task) -> tuple[Transformer, dict]:
    """The model of a config and its parameters after ``train.steps`` steps."""
    model = model_of(config, task.vocab_size)
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    state = init_state(model, optimizer, config)
    step = jax.jit(make_step(model, optimizer, config), donate_argnums=0)
    for number in range(config.train.steps):
        state, metrics = step(state, task.batch(number))
        assert metrics["finite"], f"{config.position.name}: step {number} is not finite"
    return model, state.params


def scores(model: Transformer, params: dict, task) -> dict:
    """Bits per byte by window length, and bits per token by context in the longest window."""
    bits, curve = {}, []
    for length in LENGTHS:
        options = {"length": length, "stride": length, "batch": 4096 // length, "tokens": SCORED}
        summary = score(model, params, task, "validation", **options).summary()
        bits[str(length)] = round(summary["bits_per_byte"], 4)
        curve = summary["loss_by_context"]
    return {"bits_per_byte": bits, "by_context": curve}


def read_as(model: Transformer, position: Position) -> Transformer:
    """The same network with another position module, for the parameters of the first."""
    return model.clone(position=position)


def measure() -> dict:
    task = tasks.build(config_of("rope").task, seed=0)
    models = {}
    for name in TRAINED:
        start = time.monotonic()
        model, params = trained(config_of(name), task)
        models[name] = scores(model, params, task)
        if name == "rope":
            for title, (key, options) in SCALED.items():
                position = positions.get(key)(**options)
                models[title] = scores(read_as(model, position), params, task)
        print(name, models[name]["bits_per_byte"], f"{time.monotonic() - start:.0f} s", flush=True)
    return models


def held(claim: dict, models: dict) -> bool:
    """Whether a claim of expected.json is what was measured."""
    bits = {name: model["bits_per_byte"] for name, model in models.items()}
    if "best" in claim:
        length = str(claim["length"])
        return all(bits[claim["best"]][length] < bits[other][length] for other in claim["of"])
    low, high = claim["change"]
    model = bits[claim["model"]]
    return low <= model[str(claim["to"])] - model[str(claim["from"])] <= high


def main() -> None:
    models = measure()
    about = {
        "command": "python experiments/extrapolation/measure.py",
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "sizes": SIZES | {"evaluated tokens": SCORED, "seed": 0},
    }
    claims = json.loads(EXPECTED.read_text(encoding="utf-8"))["claims"]
    results = about | {"held": {c["what"]: held(c, models) for c in claims}, "models": models}
    RESULTS.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
