"""What momentum and forgetting are worth to a memory that learns as it reads, and that memory to
attention in a window: results.json.

python experiments/titans/measure.py [recall] [ablation] [hybrids]

First random pairs are written and read back, nothing is trained; then small models of bytes learn
with all gates, and without some; then with a memory, with a window, and with both in three ways.
Parts that are not named stay as they are. Minutes on one CPU core.
"""

import itertools
import json
import os
import platform
import sys
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
from attnlab.kinds import kind_of
from attnlab.overrides import override
from attnlab.plan import estimate_cost
from attnlab.train import train

HERE = Path(__file__).parent
RESULTS, EXPECTED = HERE / "results.json", HERE / "expected.json"
DIM, PAIRS, TRIALS = 32, (16, 32, 64), 64
STEPS = (0.2, 0.4, 0.6, 0.8, 1.0)  # θ
CARRIES = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)  # η
WITHOUT = ("", "momentum", "forgetting", "both")
SEEDS = (0,)
REACH = 32  # tokens of a window or a segment
HYBRIDS = {
    "titans": {},
    "window": {"window": REACH},
    "titans_gate": {"window": REACH},
    "titans_layer": {"window": REACH},
    "titans_context": {"segment": REACH},
}
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


def config_of(attention: str, seed: int, options: dict[str, Any]) -> ConfigDict:
    config = base(attention, "rope")
    chosen = {f"attention.{name}": value for name, value in options.items()}
    for path, value in (SIZES | {"seed": seed} | chosen).items():
        override(config, path, str(value))
    return config


def bits(config: ConfigDict) -> float:
    """Bits per byte of held-out text after training."""
    with tempfile.TemporaryDirectory() as folder:
        train(config, folder)
        found = json.loads((Path(folder) / "validation.json").read_text(encoding="utf-8"))
    return round(found["bits_per_byte"], 4)


def ablated(without: str, seed: int) -> float:
    """Of `titans` without some of its gates."""
    return bits(config_of(str(HERE / "ablated.py"), seed, {"without": without}))


def hybrid(name: str, seed: int) -> float:
    """Of the memory, of a window, or of both."""
    return bits(config_of(name, seed, HYBRIDS[name]))


def parameters(name: str) -> int:
    """Learned numbers of all layers and the embedding."""
    config = config_of(name, 0, HYBRIDS[name])
    model = kind_of(config).make_model(config, None)
    return sum(estimate_cost(config, model).parameters.values())


def held(claim: dict, results: dict[str, Any]) -> bool:
    """Whether a claim of expected.json is what was measured: how much higher bits per byte are,
    with every seed, or the error of a rule over that of another, at every number of pairs."""
    if "ratio" in claim:
        low, high = claim["ratio"]
        rows = results["recall"]
        return all(low <= r[claim["what"]] / r[claim["than"]] <= high for r in rows)
    low, high = claim["above_by"]
    measured = results["bits_per_byte"] | results["hybrids"]
    found = (measured[claim[name]] for name in ("what", "than"))
    return all(low <= a - b <= high for a, b in zip(*found, strict=True))


def learned(results: dict[str, Any], part: str, names: dict[str, Any], seeds: tuple[int, ...]):
    """Fills ``results[part]``: for each name, what its function gives for every seed."""
    found: dict[str, list[float]] = {name: [] for name in names}
    results[part] = found
    for seed in seeds:
        for name, of in names.items():
            begun = time.process_time()
            found[name].append(of(seed))
            print(name, seed, found[name][-1], round(time.process_time() - begun), flush=True)
            write(results)


def write(results: dict[str, Any]) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main(*parts: str) -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results |= {
        "command": "python experiments/titans/measure.py",
        "hardware": f"{len(os.sched_getaffinity(0))} CPU core(s), {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "sizes": SIZES | {"seeds": SEEDS, "dim": DIM, "trials": TRIALS, "reach": REACH},
    }
    if not parts or "recall" in parts:
        results["recall"] = [recall(pairs) for pairs in PAIRS]
        print(json.dumps(results["recall"]), flush=True)
    if not parts or "ablation" in parts:
        names = {name or "all gates": partial(ablated, name) for name in WITHOUT}
        learned(results, "bits_per_byte", names, SEEDS)
    if not parts or "hybrids" in parts:
        results["parameters"] = {name: parameters(name) for name in HYBRIDS}
        names = {name: partial(hybrid, name) for name in HYBRIDS}
        learned(results, "hybrids", names, SEEDS)
    write(results)
    for claim in json.loads(EXPECTED.read_text(encoding="utf-8"))["claims"]:
        print(claim["what"], "than", claim["than"], held(claim, results))


if __name__ == "__main__":
    main(*sys.argv[1:])
