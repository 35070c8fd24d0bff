"""The k largest of a row: by a threshold, so that what ties with the last of them is in, too, or
exactly k. For searches and for a normaliser, which may import nothing else from here."""

import jax.numpy as jnp
from jax import lax

from attnlab.core import Array

SAME = 1e-5
"""Numbers tie within this, relative to the larger of 1 and the number. The compiler may compute
logits once to find the k-th and once more to compare with it, and round differently."""


def reach(z: Array, least: Array) -> Array:
    """Which of ``z`` are at least ``least``, or tie with it."""
    return z >= least - SAME * jnp.maximum(jnp.abs(least), 1.0)


def largest(z: Array, k: int) -> Array:
    """Which of the last axis are the ``k`` largest, of equal ones the first: [... M] f32 -> bool,
    exactly k of them, or all where there are no more. Cost: O(M ln M) on a CPU, which sorts."""
    M = z.shape[-1]
    if k >= M:
        return jnp.ones(z.shape, bool)
    # In memory, so that nothing is computed once more and rounded otherwise; and without -0, which
    # is equal to 0 and sorted below it.
    z = lax.optimization_barrier(jnp.where(z == 0, 0.0, z))
    value, place = (a[..., -1:] for a in lax.top_k(z, k))
    return (z > value) | ((z == value) & (jnp.arange(M) <= place))


def kth_largest(z: Array, k: int) -> Array:
    """The k-th largest of the last axis, exactly: [... M] f32 -> [... 1], in 32 passes, one for
    each bit of the answer. A sort, which is what a CPU makes of `lax.top_k`, takes 17 times as long
    for 2048 keys."""
    bits = lax.bitcast_convert_type(z, jnp.int32)
    bits = jnp.where(bits < 0, ~bits, bits ^ jnp.int32(-(2**31)))  # unsigned, in the order of z
    bits = lax.bitcast_convert_type(bits, jnp.uint32)

    def step(i, found):
        more = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        enough = jnp.sum(bits >= more, -1, keepdims=True) >= k
        return jnp.where(enough, more, found)

    found = lax.fori_loop(0, 32, step, jnp.zeros((*z.shape[:-1], 1), jnp.uint32))
    found = lax.bitcast_convert_type(found, jnp.int32)
    found = jnp.where(found < 0, found ^ jnp.int32(-(2**31)), ~found)
    return lax.bitcast_convert_type(found, jnp.float32)
