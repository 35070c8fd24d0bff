"""What is asked for is not one far token but all of them: which of two values is the more frequent
among 160 facts, with 32 blanks before the question. Guessing is right half of the time.
"""

from collections.abc import Iterator

import far
import jax
import jax.numpy as jnp

MECHANISMS = ("softmax", "window, 32", "lsh, 1 round", "linear", "segment", "hierarchical")


def draw(key: jax.Array, batch: int) -> far.Batch:
    """A batch of `far.draw` whose facts have values 0 and 1, with shares between 0.2 and 0.8, and
    whose questions have no key."""
    inner, shared, valued = jax.random.split(key, 3)
    plain = far.draw(inner, batch)
    share = jax.random.uniform(shared, (batch, 1), minval=0.2, maxval=0.8)
    ones = jax.random.uniform(valued, (batch, far.FACTS)) < share
    answer = (jnp.sum(ones, 1, keepdims=True) * 2 > far.FACTS).astype(jnp.int32)
    return far.Batch(
        plain.keys.at[:, -far.QUESTIONS :].set(far.FACTS),
        plain.values.at[:, : far.FACTS].set(ones.astype(jnp.int32)),
        jnp.broadcast_to(answer, (batch, far.QUESTIONS)),
    )


def measure() -> Iterator[tuple[str, float]]:
    """The share of answers that are right, mechanism by mechanism."""
    return far.measure_all(MECHANISMS, draw)
