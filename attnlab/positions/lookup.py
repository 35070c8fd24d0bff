"""Looking up a table by pairs of tokens, and its transpose, without a scatter.

A gather's gradient adds numbers at the same few addresses, which accelerators do one after the
other. Here it is a product with one-hot rows, O(K) multiply-adds a pair and head.
"""

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array

ONES_IN_FLIGHT = 2**22
"""Most entries of the one-hot array at once (f32: 16 MiB)."""


def distances(q_pos: Array, k_pos: Array) -> Array:
    """Δ = pos_q − pos_k, int32 [B N M]; negative for later keys."""
    return q_pos[:, :, None] - k_pos[:, None, :]


@jax.custom_vjp
def look_up(rows: Array, index: Array) -> Array:
    """rows[b, h, n, index[b, n, m]], f32 [B H N M]; ``rows`` [B H N K] or, one table for all
    queries, [1 H 1 K]; ``index`` int32 [B N M] in 0..K−1."""
    if rows.shape[0] == rows.shape[2] == 1:
        return jnp.take(rows[0, :, 0], index, 1, mode="clip").swapaxes(0, 1)
    return jnp.take_along_axis(rows, index[:, None], -1, mode="clip")


def collect(z: Array, index: Array, size: int) -> Array:
    """Σ over keys m with index[b, n, m] = r of z[b, h, n, m]: [B H N M], [B N M] -> f32
    [B H N size], the transpose of `look_up`."""
    return _collect(size, z, index)


def _one_hot_products(size, z, index):
    places = jnp.arange(size, dtype=index.dtype)

    def one(query):
        z, index = query  # [B H M], [B M]
        hot = (index[..., None] == places).astype(jnp.float32)
        return jnp.einsum("bhm,bmk->bhk", z, hot)

    B, N, M = index.shape
    together = max(1, min(N, ONES_IN_FLIGHT // (B * M * size)))
    queries = jnp.moveaxis(z, 2, 0), jnp.moveaxis(index, 1, 0)
    return jnp.moveaxis(lax.map(one, queries, batch_size=together), 0, 2)


def _look_up_backward(residuals, d_out):
    rows, index = residuals
    d_rows = collect(d_out, index, rows.shape[-1])
    shared = tuple(axis for axis in (0, 2) if rows.shape[axis] == 1)
    return jnp.sum(d_rows, shared, keepdims=True), None


look_up.defvjp(lambda rows, index: (look_up(rows, index), (rows, index)), _look_up_backward)

_collect = jax.custom_vjp(_one_hot_products, nondiff_argnums=(0,))
_collect.defvjp(
    lambda size, z, index: (_collect(size, z, index), index),
    lambda size, index, d_bins: (look_up(d_bins, index), None),
)
