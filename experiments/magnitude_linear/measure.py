"""Whether a larger query sharpens linear attention, and what that is worth on text: results.json.

python experiments/magnitude_linear/measure.py

The first is measured on random queries and keys; for the second small models of bytes learn with
each mechanism, on the same text and with the same budget. Minutes on one CPU core.
"""

import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from attnlab.config import base
from attnlab.core import Keys, Queries, Rule, mechanisms
from attnlab.overrides import override
from attnlab.train import train

HERE = Path(__file__).parent
RESULTS, EXPECTED = HERE / "results.json", HERE / "expected.json"
MECHANISMS = ("softmax", "linear", "magnitude_linear")
FACTORS = (0.5, 1, 2, 4)
KEYS, DIM, TRIALS = 512, 64, 64
SEEDS = (0, 1)
SIZES = {
    "task.corpus": "kjv",
    "task.length": 128,
    "task.batch": 8,
    "model.width": 64,
    "model.layers": 2,
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup": 20,
    "train.steps": 350,
    "train.eval_every": 0,
    "train.save_every": 0,
    "train.tensorboard": False,
    "evaluate.tokens": 65536,
    "sample.tokens": 8,
}


def sharpness(name: str, factor: float) -> dict[str, float]:
    """Of the weights of a query of ``factor`` times the length over `KEYS` random keys: the largest
    over an equal share, the share of negative ones, and the sum of their magnitudes."""
    q, k = jax.random.normal(jax.random.key(0), (2, TRIALS, KEYS, 1, DIM))
    pos = jnp.broadcast_to(jnp.arange(KEYS), (TRIALS, KEYS))
    v = jnp.broadcast_to(jnp.eye(KEYS)[:, None], (TRIALS, KEYS, 1, KEYS))  # outputs are weights
    queries = Queries(factor * q, pos, 0 * pos)
    out = mechanisms.get(name)()({}, queries, Keys(k, v, pos, 0 * pos), Rule()).out
    weights = out[:, -1, 0]
    found = {
        "largest": KEYS * jnp.mean(jnp.max(weights, -1)),
        "negative": jnp.mean(weights < 0),
        "magnitude": jnp.mean(jnp.sum(jnp.abs(weights), -1)),
    }
    return {key: round(float(value), 4) for key, value in found.items()}


def config_of(name: str, seed: int) -> ConfigDict:
    config = base(name, "rope")
    for path, value in (SIZES | {"seed": seed}).items():
        override(config, path, str(value))
    return config


def bits(name: str, seed: int) -> float:
    """Bits per byte of held-out text after training."""
    with tempfile.TemporaryDirectory() as folder:
        train(config_of(name, seed), folder)
        found = json.loads((Path(folder) / "validation.json").read_text(encoding="utf-8"))
    return round(found["bits_per_byte"], 4)


def held(claim: dict, bits_per_byte: dict[str, list[float]]) -> bool:
    """Whether a claim of expected.json is what was measured, with every seed."""
    low, high = claim["above_by"]
    pairs = zip(bits_per_byte[claim["what"]], bits_per_byte[claim["than"]], strict=True)
    return all(low <= a - b <= high for a, b in pairs)


def main() -> None:
    sharp = {name: {str(f): sharpness(name, f) for f in FACTORS} for name in MECHANISMS}
    found: dict[str, list[float]] = {name: [] for name in MECHANISMS}
    results: dict[str, Any] = {
        "command": "python experiments/magnitude_linear/measure.py",
        "hardware": f"{len(os.sched_getaffinity(0))} CPU core(s), {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "sizes": SIZES | {"seeds": SEEDS, "keys": KEYS, "dim": DIM, "trials": TRIALS},
        "sharpness": sharp,
        "bits_per_byte": found,
    }
    print(json.dumps(sharp), flush=True)
    for seed in SEEDS:
        for name in MECHANISMS:
            begun = time.process_time()
            found[name].append(bits(name, seed))
            seconds = round(time.process_time() - begun)
            print(name, seed, found[name][-1], f"{seconds} processor seconds", flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for claim in json.loads(EXPECTED.read_text(encoding="utf-8"))["claims"]:
        print(claim["what"], "against", claim["than"], held(claim, found))


if __name__ == "__main__":
    main()
