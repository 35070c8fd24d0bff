"""One key that resembles the query, among many that do not: what each mechanism makes of it, with
nothing trained: results.json.

python experiments/planted/measure.py

Keys are random directions; the query, the last token, has cosine 0.9 to one key of the first half,
and logits are 9 times the cosine. The values are an indicator of that key, so that the output is
its weight. The weight of the query's own key, which some mechanisms always see and others never, is
left out of all of them: w / (1 − own).
"""

import dataclasses
import json
import os
import platform
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnlab.core import Dims, Keys, Mechanism, Queries, Rule, mechanisms, positions
from attnlab.mechanisms.lsh import Lsh
from attnlab.mechanisms.routing import Routing

HERE = Path(__file__).parent
RESULTS, EXPECTED = HERE / "results.json", HERE / "expected.json"
LENGTH, SIZE, COSINE, LOGIT = 1024, 32, 0.9, 9.0
TRIALS, HEADS = 200, 50  # a trial is a head: what is drawn or measured is its own
PASSES = 30  # of k-means over the keys

MECHANISMS: dict[str, tuple[str, dict[str, int]]] = {
    "softmax": ("softmax", {}),
    "lsh, 1 round": ("lsh", {"rounds": 1, "buckets": 64, "length": 32}),
    "lsh, 2 rounds": ("lsh", {"rounds": 2, "buckets": 64, "length": 32}),
    "lsh, 4 rounds": ("lsh", {"rounds": 4, "buckets": 64, "length": 32}),
    "lsh, 8 rounds": ("lsh", {"rounds": 8, "buckets": 64, "length": 32}),
    "lsh, 4 rounds, 16 buckets": ("lsh", {"rounds": 4, "buckets": 16, "length": 32}),
    "routing": ("routing", {"clusters": 32, "length": 64}),
    "block_topk, 4 of 32": ("block_topk", {"block": 32, "chosen": 4}),
    "block_topk, 16 of 32": ("block_topk", {"block": 32, "chosen": 16}),
    "window, 32": ("window", {"window": 32}),
    "strided, 32": ("strided", {"stride": 32}),
    "favor, 64": ("favor", {"features": 64}),
    "favor, 1024": ("favor", {"features": 1024}),
    "hierarchical": ("hierarchical", {"block": 32}),
    "linear": ("linear", {}),
}


def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Unit vectors [HEADS LENGTH SIZE], the last of them the query, and the needle's place."""
    noise, other, place = jax.random.split(key, 3)
    z = jax.random.normal(noise, (HEADS, LENGTH, SIZE))
    z /= jnp.linalg.norm(z, axis=-1, keepdims=True)
    at = jax.random.randint(place, (HEADS,), 0, LENGTH // 2)
    near = jnp.take_along_axis(z, at[:, None, None], 1)[:, 0]
    aside = jax.random.normal(other, (HEADS, SIZE))
    aside -= jnp.sum(aside * near, -1, keepdims=True) * near
    aside /= jnp.linalg.norm(aside, axis=-1, keepdims=True)
    return z.at[:, -1].set(COSINE * near + (1 - COSINE**2) ** 0.5 * aside), at


@partial(jax.jit, static_argnums=0)
def weights(mechanism: Mechanism, params: Any, key: jax.Array) -> tuple[jax.Array, Any]:
    """The weight of the needle [HEADS], and what the mechanism measured about the tokens."""
    z, at = draw(key)
    # Shared vectors are the sum of both over √2, and their own length the temperature.
    length = LOGIT / 2**0.5 if isinstance(mechanism, Lsh) else LOGIT**0.5 * SIZE**0.25
    z = length * jnp.swapaxes(z, 0, 1)[None]
    pos = jnp.arange(LENGTH)[None]
    needle = pos[..., None] == at
    own = jnp.broadcast_to(pos[..., None] == LENGTH - 1, needle.shape)
    values = jnp.stack([needle, own], -1).astype(jnp.float32)
    rule = Rule({}, positions.get("none")(), True)
    queries, keys = Queries(z, pos, pos * 0), Keys(z, values, pos, pos * 0)
    result = mechanism(params, queries, keys, rule, key=jax.random.fold_in(key, 1))
    found, itself = result.out[0, -1, :, 0], result.out[0, -1, :, 1]
    return found / jnp.maximum(1.0 - itself, 1e-6), (result.aux or {}).get("statistics")


def prepared(mechanism: Mechanism, key: jax.Array) -> Any:
    """The parameters a mechanism starts with; centroids after k-means over the keys."""
    params = mechanism.init(jax.random.key(0), Dims(SIZE * HEADS, HEADS, HEADS, SIZE, 2))
    if isinstance(mechanism, Routing):
        params = {**params, "temperature": jnp.log(jnp.full(HEADS, LOGIT / SIZE**0.5))}
        learning = dataclasses.replace(mechanism, decay=0.0)
        for _ in range(PASSES):
            params = {**params, "statistics": weights(learning, params, key)[1]}
    return params


def measure(name: str, options: dict[str, int]) -> dict[str, float]:
    """Mean weight of the needle, and how often it is above an equal share, 1 / `LENGTH`."""
    mechanism, found = mechanisms.get(name)(**options), []
    for number in range(TRIALS // HEADS):
        key = jax.random.key(number)
        found.append(np.asarray(weights(mechanism, prepared(mechanism, key), key)[0]))
    every = np.concatenate(found)
    return {"weight": round(float(every.mean()), 4), "met": float(np.mean(every > 1 / LENGTH))}


def outside(results: dict, expected: dict) -> list[str]:
    """What is not in its band."""
    said = []
    for label, (low, high) in expected["weight"].items():
        found = results["found"][label]["weight"]
        if not low <= found <= high:
            said.append(f"{label}: weight {found} not in {low}..{high}")
    return said


def main() -> None:
    found = {}
    for label, (name, options) in MECHANISMS.items():
        found[label] = measure(name, options)
        print(label, found[label], flush=True)
    results = {
        "command": "python experiments/planted/measure.py",
        "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "found": found,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    expected = json.loads(EXPECTED.read_text(encoding="utf-8"))
    print("\n".join(outside(results, expected)) or "as expected")


if __name__ == "__main__":
    main()
