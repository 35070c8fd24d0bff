"""What momentum and forgetting are worth to a memory that learns as it reads: results.json.

python experiments/titans/measure.py

First random pairs are written and read back, nothing is trained; then small models of bytes learn
with all gates, and without some. Minutes on one CPU core.
"""

import itertools
import json
import os
import platform
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from attnlab.config import base
from attnlab.engines import momentum, undecayed
from attnlab.engines.momentum import Gates
from attnlab.overrides import override
from attnlab.train import train

HERE = Path(__file__).parent
RESULTS, EXPECTED = HERE / "results.json", HERE / "expected.json"
DIM, PAIRS, TRIALS = 32, (16, 32, 64), 64
STEPS = (0.2, 0.4, 0.6, 0.8, 1.0)  # θ
CARRIES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)  # η
WITHOUT = ("", "momentum", "forgetting", "both")
SEEDS = (0,)
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


def error(k, v, memory) -> jax.Array:
    """The squared error of what is read over that of reading nothing."""
    found = jnp.einsum("bgde,bngd->bnge", memory, k, precision="highest")
    return jnp.mean((found - v) ** 2) / jnp.mean(v**2)


@partial(jax.jit, static_argnums=0)
def errors(pairs: int) -> tuple[jax.Array, jax.Array]:
    """Of ``pairs`` random pairs, added up, and written once with every θ and η: [θ η]."""
    keys = jax.random.split(jax.random.key(pairs), 2)
    k, v = (jax.random.normal(key, (TRIALS, pairs, 1, DIM)) for key in keys)
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    seg, one = jnp.zeros((TRIALS, pairs), jnp.int32), jnp.ones((TRIALS, pairs, 1))

    def written(gates):
        step, carry = gates
        carry = jnp.maximum(jnp.log(carry), -1e9)
        state = momentum.attend(k, k, v, Gates(step * one, carry * one, 0 * one), seg)[1]
        return error(k, v, state.memory)

    grid = jnp.array(list(itertools.product(STEPS, CARRIES)))
    found = jax.lax.map(written, grid).reshape(len(STEPS), len(CARRIES))
    return error(k, v, undecayed.attend(k, k, v, seg)[1].memory), found


def recall(pairs: int) -> dict[str, Any]:
    """The errors of four rules, and the best of all tried θ and η."""
    hebbian, found = errors(pairs)
    best = jnp.unravel_index(jnp.argmin(found), found.shape)
    return {
        "pairs": pairs,
        "hebbian": round(float(hebbian), 4),
        "delta": round(float(found[-1, 0]), 4),
        "delta, best step": round(float(jnp.min(found[:, 0])), 4),
        "momentum, best step": round(float(jnp.min(found)), 4),
        "best": {"step": STEPS[int(best[0])], "carry": CARRIES[int(best[1])]},
    }


def config_of(without: str, seed: int) -> ConfigDict:
    config = base(str(HERE / "ablated.py"), "rope")
    for path, value in (SIZES | {"seed": seed, "attention.without": without}).items():
        override(config, path, str(value))
    return config


def bits(without: str, seed: int) -> float:
    """Bits per byte of held-out text after training."""
    with tempfile.TemporaryDirectory() as folder:
        train(config_of(without, seed), folder)
        found = json.loads((Path(folder) / "validation.json").read_text(encoding="utf-8"))
    return round(found["bits_per_byte"], 4)


def held(claim: dict, results: dict[str, Any]) -> bool:
    """Whether a claim of expected.json is what was measured: how much higher bits per byte are,
    with every seed, or the error of a rule over that of another, at every number of pairs."""
    part = "bits_per_byte" if "above_by" in claim else "recall"
    low, high = claim.get("above_by") or claim["ratio"]
    if part == "recall":
        return all(low <= r[claim["what"]] / r[claim["than"]] <= high for r in results[part])
    found = (results[part][claim[name]] for name in ("what", "than"))
    return all(low <= a - b <= high for a, b in zip(*found, strict=True))


def main() -> None:
    found: dict[str, list[float]] = {name or "all gates": [] for name in WITHOUT}
    results: dict[str, Any] = {
        "command": "python experiments/titans/measure.py",
        "hardware": f"{len(os.sched_getaffinity(0))} CPU core(s), {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "sizes": SIZES | {"seeds": SEEDS, "dim": DIM, "trials": TRIALS},
        "recall": [recall(pairs) for pairs in PAIRS],
        "bits_per_byte": found,
    }
    print(json.dumps(results["recall"]), flush=True)
    for seed in SEEDS:
        for name in WITHOUT:
            begun = time.process_time()
            found[name or "all gates"].append(bits(name, seed))
            seconds = round(time.process_time() - begun)
            print(name or "all gates", seed, found[name or "all gates"][-1], seconds, flush=True)
            RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for claim in json.loads(EXPECTED.read_text(encoding="utf-8"))["claims"]:
        print(claim["what"], "than", claim["than"], held(claim, results))


if __name__ == "__main__":
    main()
