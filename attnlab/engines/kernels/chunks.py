"""What a kernel does with one chunk of a decaying recurrence: the equations of `recurrent`.

Functions of values, the same for every device, of one head: q [C D], k [C D], v [C E], the state
``before`` the chunk [D E]; log decays as rows [1 C], or [C D] and [C E] along an axis, or None.
Everything is f32.

At each halving, blocks of h tokens and those before them, the later block reads the earlier one
and both decay towards the point between them. A kernel has no use for halves of an array: it takes
the product of all pairs and keeps those of the two blocks. The sums of decays since a block began
and until it ends are products with a matrix of 0 and 1, in full precision: nothing is subtracted.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array


class Chunk(NamedTuple):
    """A chunk as one query head sees it, or its gradient; None for what is not there."""

    q: Any
    k: Any
    v: Any
    key_decay: Any
    value_decay: Any
    before: Any


def read(chunk: Chunk) -> Array:
    """What every token of the chunk reads: [C E]."""

    def add(level, out):
        return out + _from_earlier(level, chunk)

    return lax.fori_loop(0, _levels(chunk), add, _from_state(chunk) + _from_itself(chunk))


def pull(chunk: Chunk, d_out: Array, total: Chunk) -> Chunk:
    """``total`` and the gradient of `read`: part by part, so that little is alive at once."""

    def add(part: Callable, chunk: Chunk, total: Chunk) -> Chunk:
        return jax.tree.map(jnp.add, total, jax.vjp(part, chunk)[1](d_out)[0])

    def step(level, total):
        return add(partial(_from_earlier, level), inner, total)

    inner, total = chunk._replace(before=None), add(_from_state, chunk, total)
    within = add(_from_itself, inner, total._replace(before=None))
    return lax.fori_loop(0, _levels(chunk), step, within)._replace(before=total.before)


def _levels(chunk: Chunk) -> int:
    """Halvings of a chunk, of which the size is a power of two."""
    return chunk.k.shape[0].bit_length() - 1


def _from_state(chunk: Chunk) -> Array:
    since = _since(_levels(chunk), chunk.k.shape[0])
    asking = chunk.q * _faded(chunk.key_decay, since)
    return _product(asking, chunk.before, 1, 0) * _faded(chunk.value_decay, since)


def _from_itself(chunk: Chunk) -> Array:
    return jnp.sum(chunk.q * chunk.k, 1, keepdims=True) * chunk.v


def _from_earlier(level: Array, chunk: Chunk) -> Array:
    """What every second block of 2^level tokens reads from the one before it."""
    q, k, v, a, b, _ = chunk
    since, until = (side(level, q.shape[0]) for side in (_since, _until))
    row, column = (block >> level for block in _places(q.shape[0]))
    pairs = _product(q * _faded(a, since), k * _faded(a, until), 1, 1)
    pairs = jnp.where((row == column + 1) & (row % 2 == 1), pairs, 0.0)
    return _product(pairs, v * _faded(b, until), 1, 0) * _faded(b, since)


def _places(size: int) -> tuple[Array, Array]:
    """Row and column of each pair of tokens."""
    row, column = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    return row, column


def _since(level: Array | int, size: int) -> Array:
    """At (t, j) 1 where j is in the block of t and not after it, else 0."""
    row, column = _places(size)
    return ((row >> level == column >> level) & (column <= row)).astype(jnp.float32)


def _until(level: Array, size: int) -> Array:
    """At (t, j) 1 where j is in the block of t and after it, else 0."""
    row, column = _places(size)
    return ((row >> level == column >> level) & (column > row)).astype(jnp.float32)


def _faded(decay: Array | None, counted: Array) -> Array | float:
    """e to the sum of the decays that are ``counted`` [C C] for each token: [C X] or [C 1]."""
    if decay is None:
        return 1.0
    if decay.shape[0] == 1:
        return jnp.exp(jnp.sum(counted * decay, 1, keepdims=True))
    return jnp.exp(_product(counted, decay, 1, 0, lax.Precision.HIGHEST))


def _product(a: Array, b: Array, i: int, j: int, precision: lax.Precision | None = None) -> Array:
    """Summed over axis i of a and axis j of b."""
    axes = (((i,), (j,)), ((), ()))
    return lax.dot_general(a, b, axes, precision, preferred_element_type=jnp.float32)
