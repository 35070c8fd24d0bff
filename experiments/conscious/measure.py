"""What a bottleneck of few elements answers, reads and foresees: results.json.

python experiments/conscious/measure.py

Small models learn the exclusive or of two named slots, once with other slots that know nothing and
once with others that agree with the answer in training and disagree afterwards; then a conscious
state learns to be told from others by what comes later. Minutes on one CPU core.
"""

import argparse
import json
import os
import platform
import time
from functools import partial
from pathlib import Path
from typing import Any

import foresight
import jax
import jax.numpy as jnp
import optax
import slots

from attnlab.core import Array, Mechanism
from attnlab.mechanisms.conscious import Conscious
from attnlab.mechanisms.softmax import Softmax

HERE = Path(__file__).parent
RESULTS, EXPECTED = HERE / "results.json", HERE / "expected.json"
RUNS = (
    (12, 0.5, False),
    (12, 0.7, False),
    (12, 0.9, False),
    (36, 0.5, False),
    (12, 0.5, True),
    (12, 0.7, True),
    (12, 0.9, True),
    (36, 0.5, True),
)
"""Slots; how often those that are not named agree with the answer in training; and whether queries
and keys start tied."""
SEEDS, STEPS, BATCH, RATE, TESTED = 3, 4000, 128, 1e-3, 4096
MECHANISMS: dict[str, Mechanism] = {
    "1 masked": Conscious(1),
    "2 masked": Conscious(2),
    "4 masked": Conscious(4),
    "1 straight_through": Conscious(1, "straight_through"),
    "2 straight_through": Conscious(2, "straight_through"),
    "4 straight_through": Conscious(4, "straight_through"),
    "all": Softmax(),
}
FORESEEN = {
    "bits last": {"diversity": 0.0, "lasts": 0.8, "favour": 0.0},
    "bits are drawn anew": {"diversity": 0.0, "lasts": 0.0, "favour": 0.0},
    "bits last, diverse": {"diversity": 0.5, "lasts": 0.8, "favour": 0.0},
    "bits last, one slot favoured": {"diversity": 0.0, "lasts": 0.8, "favour": 60.0},
    "bits last, one slot favoured, diverse": {"diversity": 0.5, "lasts": 0.8, "favour": 60.0},
}


def score(params, mechanism: Mechanism, batch: tuple[Array, Array, Array]) -> dict[str, Array]:
    """Of a batch: the loss in nats; how often the answer is right, both named slots are among those
    read, and the two slots that weigh most (of one: that one) are named."""
    bits, named, right = batch
    found, weights = slots.read(params, mechanism, bits, params["names"][named].sum(1))
    z = slots.answer(params, found)
    read = jnp.take_along_axis(weights, named, 1) > 0
    size = min(2, getattr(mechanism, "elements", 2))
    heaviest = jax.lax.top_k(weights, size)[1]
    named_ones = jnp.any(heaviest[..., None] == named[:, None], -1)
    return {
        "loss": jnp.mean(jax.nn.softplus(jnp.where(right == 1, -z, z))),
        "accuracy": jnp.mean((z > 0) == (right == 1)),
        "read": jnp.mean(jnp.all(read, 1)),
        "heaviest": jnp.mean(jnp.all(named_ones, 1)),
    }


@partial(jax.jit, static_argnums=(0, 1, 2))
def learn(
    mechanism: Mechanism,
    number: int,
    steps: int,
    tied: Array,
    agree: Array,
    tests: Array,
    seeds: Array,
) -> dict[str, Any]:
    """Scores on fresh rows [seeds tests] after training with slots that ``agree``, where they agree
    as often as each of ``tests`` says."""
    optimizer = optax.adam(RATE)

    def one(seed: Array) -> dict[str, Any]:
        start, data, test = jax.random.split(jax.random.key(seed), 3)
        params = slots.init(start, number, tied)

        def loss(params, step):
            batch = slots.draw(jax.random.fold_in(data, step), BATCH, number, agree)
            return score(params, mechanism, batch)["loss"]

        def update(carry, step):
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, step), state)
            return (optax.apply_updates(params, updates), state), None

        trained = jax.lax.scan(update, (params, optimizer.init(params)), jnp.arange(steps))[0][0]

        def tested(p: Array) -> dict[str, Array]:
            return score(trained, mechanism, slots.draw(test, TESTED, number, p))

        return jax.lax.map(tested, tests)

    return jax.lax.map(one, seeds)


def rounded(tree: Any) -> Any:
    return jax.tree.map(lambda z: [round(float(x), 4) for x in z], tree)


def answered(name: str, number: int, agree: float, tied: bool, steps: int) -> dict[str, Any]:
    """`learn`, a number a seed: with slots that agree as in training and, if these tell something,
    with slots that know nothing, and with slots that disagree as often as they agreed."""
    tests = (agree, 0.5, round(1 - agree, 6))
    begun = time.process_time()
    given = jnp.bool_(tied), jnp.float32(agree), jnp.array(tests), jnp.arange(SEEDS)
    found = learn(MECHANISMS[name], number, steps, *given)
    scores = {
        str(p): rounded(jax.tree.map(lambda z, i=i: z[:, i], found)) for i, p in enumerate(tests)
    }
    print(number, agree, tied, name, f"{time.process_time() - begun:.0f} s", flush=True)
    for p, each in scores.items():
        print("  ", p, {key: each[key] for key in ("accuracy", "read", "heaviest")}, flush=True)
    return scores


def foreseen(steps: int) -> dict[str, Any]:
    """`foresight.learn` by what lasts and what is asked for, a number a seed."""
    found: dict[str, Any] = {}
    for name, options in FORESEEN.items():
        given = [jnp.float32(z) for z in options.values()]
        runs = [foresight.learn(steps, *given, jnp.int32(seed)) for seed in range(SEEDS)]
        found[name] = options | rounded(jax.tree.map(lambda *z: jnp.stack(z), *runs))
        print(name, found[name], flush=True)
    return found


def at(results: Any, path: list[str]) -> Any:
    for step in path:
        results = results[step]
    return results


def outside(results: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """The bands of expected.json that some seed is not in: each the path of a list of numbers, one
    a seed, and what all of them lie between; with ``less``, the path of a list to take off them."""
    wrong = []
    for band in expected["bands"]:
        found = at(results, band["path"])
        less = at(results, band["less"]) if "less" in band else [0.0] * len(found)
        low, high = band["between"]
        numbers = [a - b for a, b in zip(found, less, strict=True)]
        if not all(low <= z <= high for z in numbers):
            wrong.append(f"{band['path']}: {numbers} not in {low} to {high}")
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    results: dict[str, Any] = {
        "command": "python experiments/conscious/measure.py",
        "hardware": f"{len(os.sched_getaffinity(0))} CPU core(s), {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "sizes": {
            "steps": given.steps,
            "batch": BATCH,
            "rate": RATE,
            "seeds": SEEDS,
            "width": slots.WIDTH,
            "tested": TESTED,
        },
    }
    if given.out.is_file():  # an interrupted run goes on
        kept = json.loads(given.out.read_text(encoding="utf-8"))
        results = kept if kept["sizes"] == results["sizes"] else results
    if "foreseen" not in results:
        results["foreseen"] = foreseen(given.steps // 2)
    for number, agree, tied in RUNS:
        part = f"{number} slots, {agree}{', tied' * tied}"
        found = results.setdefault("exclusive_or", {}).setdefault(part, {})
        for name in MECHANISMS:
            if name not in found:
                found[name] = answered(name, number, agree, tied, given.steps)
                given.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for line in outside(results, json.loads(EXPECTED.read_text(encoding="utf-8"))):
        print(line)


if __name__ == "__main__":
    main()
