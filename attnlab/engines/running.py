"""Weights that are given in log space, as exponentials of what exceeds their running maximum.

A sum over the past of e^(l_s) x_s overflows, or is lost to underflow, unless it is kept as
e^(-μ_t) times itself, with μ_t = max over s <= t of l_s. That is a recurrence which decays:
    w_t = e^(l_t - μ_t) <= 1,    log decay_t = μ_(t-1) - μ_t <= 0.
The maximum is over the past of the same document only, so nothing of a later token reaches an
earlier one, and it cancels in any ratio of two such sums, so it has no gradient.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array


class Top(NamedTuple):
    """The maximum so far, ``top`` [B ...] f32, of the document ``seg`` [B]."""

    top: Array
    seg: Array


def initial_top(batch: int, *shape: int) -> Top:
    """No past."""
    return Top(jnp.full((batch, *shape), MASK), jnp.full(batch, -1, jnp.int32))


def rescale(
    log_weight: Array, seg: Array, state: Top | tuple[()] = ()
) -> tuple[Array, Array, Array, Top]:
    """The running maximum of ``log_weight`` [B N ...] along N, taken out.

    Returns ``weight``, ``log decay`` and the maximum, f32 in the shape of ``log_weight``, and the
    `Top` after the last token. A log weight of `MASK` or less writes nothing, ``weight`` is then 0,
    as in empty slots. Cost: O(N).
    """
    if not state:
        state = initial_top(seg.shape[0], *log_weight.shape[2:])
    document, fresh = _documents(seg, state.seg)
    written = _like(seg >= 0, log_weight) & (log_weight > MASK)
    before = jnp.concatenate([state.top[:, None], jnp.where(written, log_weight, MASK)], 1)
    top = _highest(lax.stop_gradient(before), jnp.pad(fresh, ((0, 0), (1, 0))))
    before, top = top[:, :-1], top[:, 1:]
    weight = jnp.where(written, jnp.exp(jnp.where(written, log_weight, top) - top), 0)
    decay = jnp.where(_like(fresh, top), 0, before - top)
    return weight, decay, top, Top(top[:, -1], document[:, -1])


def rescale_both_ways(log_weight: Array, seg: Array) -> tuple[Array, Array]:
    """The maximum over the whole document of each token, before and after it, taken out:
    ``weight`` and the maximum, both f32 in the shape of ``log_weight`` [B N ...]."""

    def flip(z: Array) -> Array:
        return jnp.flip(z, 1)

    _, _, before, _ = rescale(log_weight, seg)
    _, _, after, _ = rescale(flip(log_weight), flip(seg))
    top = jnp.maximum(before, flip(after))
    written = _like(seg >= 0, log_weight)
    return jnp.where(written, jnp.exp(jnp.where(written, log_weight, top) - top), 0), top


def _like(z: Array, other: Array) -> Array:
    """[B N] with the axes that ``other`` has beyond."""
    return z.reshape(*z.shape, *[1] * (other.ndim - 2))


def _documents(seg: Array, before: Array) -> tuple[Array, Array]:
    """The document that each slot stands in, empty slots included, and where one begins: [B N]."""
    slots = lax.cummax(jnp.where(seg >= 0, jnp.arange(seg.shape[1]), -1), 1)
    own = jnp.take_along_axis(seg, jnp.maximum(slots, 0), 1)
    document = jnp.where(slots >= 0, own, before[:, None])
    earlier = jnp.concatenate([before[:, None], document[:, :-1]], 1)
    return document, document != earlier


def _highest(values: Array, fresh: Array) -> Array:
    """Running maximum along axis 1 that starts anew where ``fresh``."""

    def merge(a, b):
        return a[0] | b[0], jnp.where(b[0], b[1], jnp.maximum(a[1], b[1]))

    return lax.associative_scan(merge, (_like(fresh, values), values), axis=1)[1]
