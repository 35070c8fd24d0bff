"""Units of text: which word, sentence and paragraph a token belongs to, and one key for each."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from attnlab.core import Array, Keys
from attnlab.engines.pooling import total

LEVELS = 3
"""Words, sentences and paragraphs."""


class Units(NamedTuple):
    """Tokens, or one token for each unit of a level, packed to the front.

    ``keys`` have the number of tokens they stand for as ``count``; ``first`` and ``last`` [B M] are
    the positions that a unit spans, ``above`` [levels above, B M] the numbers of the unit of each
    level above that it lies in, the document last; -1 in empty slots.
    """

    keys: Keys
    first: Array
    last: Array
    above: Array


def numbered(keys: Keys) -> Units:
    """The tokens themselves. Units are numbered along the row and end with their document; tokens
    of a document stand in the order of their positions."""
    keys = keys.cleared()
    B, M = keys.pos.shape
    full = keys.seg >= 0
    unit = jnp.zeros((B, M), jnp.int32) if keys.unit is None else keys.unit
    slots = jax.lax.cummax(jnp.where(full, jnp.arange(M), -1), axis=1)
    before = jnp.pad(slots[:, :-1], ((0, 0), (1, 0)), constant_values=-1)

    def earlier(z: Array) -> Array:
        return jnp.take_along_axis(z, jnp.maximum(before, 0), 1)

    begins = (before < 0) | (keys.seg != earlier(keys.seg))
    between = jnp.maximum(unit // 4, earlier(unit) % 4)
    above = [
        jnp.where(full, jnp.cumsum(full & (begins | (between >= level)), 1) - 1, -1)
        for level in range(1, LEVELS + 1)
    ]
    above = jnp.stack([*above, jnp.where(full, keys.seg, -1)])
    return Units(keys._replace(count=jnp.ones((B, M)), unit=None), keys.pos, keys.pos, above)


def pooled(units: Units, score: Array) -> Units:
    """The units one level up: their keys and values are means of those below, weighed by softmax of
    ``score`` [B M G] plus ln count. Cost: O(M (D + E))."""
    keys, number = units.keys, units.above[0]
    assert keys.count is not None
    M = number.shape[1]
    place = jnp.where(number >= 0, number, M)

    def highest(z: Array) -> Array:
        return jax.vmap(lambda z, n: jax.ops.segment_max(z, n, M + 1))(z, place)[:, :M]

    score = score.astype(jnp.float32) + jnp.log(jnp.maximum(keys.count, 1))[..., None]
    # The largest of a unit cancels, so it has no gradient; units do not share one, because a later
    # unit must not round an earlier one.
    top = highest(jax.lax.stop_gradient(score))
    top = jax.vmap(lambda z, n: z[n])(top, jnp.maximum(number, 0))
    weight = jnp.exp(jnp.where((number >= 0)[..., None], score - top, -jnp.inf))
    sums = total(weight, number)
    sums = jnp.where(sums > 0, sums, 1)

    def average(z: Array) -> Array:
        part = total(weight[..., None] * z.astype(jnp.float32), number) / sums[..., None]
        return part.astype(z.dtype)

    above = jax.vmap(highest)(units.above[1:])
    full = highest(number) >= 0
    seg = jnp.where(full, highest(keys.seg), -1)
    first, last = (jnp.where(full, z, 0) for z in (-highest(-units.first), highest(units.last)))
    count = total(keys.count, number)
    means = Keys(average(keys.k), average(keys.v), last, seg, count)
    return Units(means, first, last, jnp.where(full, above, -1))
