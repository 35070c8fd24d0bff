"""One key that matters among n: trained at n = 64, asked at up to 64 times as many.

Every token has a random vector for a key and a class for a value; one query repeats the key of one
token and asks for its class. One head, trained with each normaliser.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from attnlab.analysis.dilution import measure_rows
from attnlab.core import Dims, Keys, Normaliser, Queries, Rule
from attnlab.engines import blockwise
from attnlab.normalisers.log_n import LogN
from attnlab.normalisers.sigmoid import Sigmoid
from attnlab.normalisers.softmax import Softmax
from attnlab.normalisers.sparsemax import Sparsemax
from attnlab.normalisers.ssmax import Ssmax
from attnlab.normalisers.top_k import TopK

KEY, VALUE, HEAD, CLASSES = 32, 32, 32, 16
TRAINED, LENGTHS = 64, (64, 256, 1024, 4096)
STEPS, BATCH, RATE = 700, 32, 6e-4
SAMPLES = 128

NORMALISERS: dict[str, Normaliser] = {
    "softmax": Softmax(),
    "ssmax": Ssmax(TRAINED),
    "top_k": TopK(8),
    "sparsemax": Sparsemax(),
    "sigmoid": Sigmoid(),
}
"""Each trained with itself."""

READ: dict[str, Normaliser] = {"log_n": LogN(TRAINED), "top_k": TopK(8)}
"""What is put in the place of softmax after training."""


class Batch(NamedTuple):
    """``keys`` [B n KEY], ``values`` [B n] and the number of the token that is asked for [B]."""

    keys: jax.Array
    values: jax.Array
    asked: jax.Array


def draw(key: jax.Array, batch: int, n: int) -> Batch:
    vectors, classes, numbers = jax.random.split(key, 3)
    return Batch(
        jax.random.normal(vectors, (batch, n, KEY)),
        jax.random.randint(classes, (batch, n), 0, CLASSES),
        jax.random.randint(numbers, (batch,), 0, n),
    )


def init(key: jax.Array, normaliser: Normaliser) -> dict[str, Any]:
    """Token = [key, embedding of the value]; a query has zeros in place of a value. Queries and
    keys start with the same projection: a match then stands out from the first step on, without
    which weights that can be zero would have no gradient to find it by."""
    shapes = {
        "key": (KEY + VALUE, HEAD),
        "value": (KEY + VALUE, HEAD),
        "embedding": (CLASSES, VALUE),
        "head": (HEAD, CLASSES),
    }
    draws = jax.random.split(key, len(shapes))
    params = {
        name: jax.random.normal(k, shape) * shape[0] ** -0.5
        for k, (name, shape) in zip(draws, shapes.items())
    }
    dims = Dims(KEY + VALUE, 1, 1, HEAD, HEAD)
    return {**params, "query": params["key"], "normaliser": normaliser.init(key, dims)}


def attend(normaliser: Normaliser, params: Any, batch: Batch) -> tuple[Queries, Keys, Rule]:
    B, n = batch.values.shape
    asked = jnp.take_along_axis(batch.keys, batch.asked[:, None, None], 1)
    tokens = jnp.concatenate([batch.keys, params["embedding"][batch.values]], -1)
    query = jnp.concatenate([asked, jnp.zeros((B, 1, VALUE))], -1)
    pos = jnp.broadcast_to(jnp.arange(n), (B, n))
    queries = Queries((query @ params["query"])[:, :, None], pos[:, -1:], pos[:, -1:] * 0)
    k, v = ((tokens @ params[name])[:, :, None] for name in ("key", "value"))
    rule = Rule(normaliser=normaliser, normaliser_params=params["normaliser"])
    return queries, Keys(k, v, pos, pos * 0), rule


def answer(normaliser: Normaliser, params: Any, batch: Batch) -> jax.Array:
    """Logits of the classes [B CLASSES]."""
    out, _ = blockwise.attend(*attend(normaliser, params, batch))
    return out[:, 0, 0] @ params["head"]


@partial(jax.jit, static_argnums=0)
def train(normaliser: Normaliser, key: jax.Array) -> Any:
    optimizer = optax.adam(RATE)
    start, batches = jax.random.split(key)
    params = init(start, normaliser)

    def loss(params, batch):
        logits = answer(normaliser, params, batch)
        label = jnp.take_along_axis(batch.values, batch.asked[:, None], 1)[:, 0]
        return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    def step(carry, key):
        params, state = carry
        grads = jax.grad(loss)(params, draw(key, BATCH, TRAINED))
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(batches, STEPS)
    return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]


@partial(jax.jit, static_argnums=(0, 3))
def test(normaliser: Normaliser, params: Any, key: jax.Array, n: int) -> tuple[Any, Any]:
    """Of a batch: whether the answers are right, and the weights on the token that was asked."""
    batch = draw(key, BATCH, n)
    rows = measure_rows(*attend(normaliser, params, batch), batch.asked[:, None, None])
    label = jnp.take_along_axis(batch.values, batch.asked[:, None], 1)[:, 0]
    right = jnp.argmax(answer(normaliser, params, batch), -1) == label
    return right, rows.signal[:, 0, 0]


def measure(seed: int = 0) -> Iterator[tuple[str, list[dict[str, float]]]]:
    """For every normaliser, accuracy and mean weight on the key that matters at each length."""
    for name, normaliser in NORMALISERS.items():
        params = train(normaliser, jax.random.key(seed))
        yield name, scores(normaliser, params)
        for other, reading in READ.items() if name == "softmax" else ():
            yield f"{other}, trained as softmax", scores(reading, params)


def scores(normaliser: Normaliser, params: Any) -> list[dict[str, float]]:
    rows = []
    for n in LENGTHS:
        keys = jax.random.split(jax.random.key(n), SAMPLES // BATCH)
        right, weight = zip(*(test(normaliser, params, key, n) for key in keys))
        rows.append({"n": n, "accuracy": _mean(right), "weight": _mean(weight)})
    return rows


def _mean(values: Any) -> float:
    return round(float(np.mean(np.concatenate(values), dtype=np.float64)), 4)
