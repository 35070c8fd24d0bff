"""What biases that are looked up in a table share."""

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array

ROWS = 32
"""Queries whose one-hot array is alive at once in the backward pass."""


def distances(q_pos: Array, k_pos: Array) -> Array:
    """Δ = pos_q − pos_k, int32 [B N M]; negative for later keys."""
    return q_pos[:, :, None] - k_pos[:, None, :]


@jax.custom_vjp
def look_up(rows: Array, index: Array) -> Array:
    """rows[b, h, n, index[b, n, m]], f32 [B H N M]; ``rows`` [B H N K] or, for one table for all
    queries, [1 H 1 K]; ``index`` int32 [B N M] in 0..K−1.

    The gradient of a gather adds numbers at the same few addresses, which accelerators do one after
    the other; here it is a product with one-hot rows, O(N M K) multiply-adds a head.
    """
    if rows.shape[0] == rows.shape[2] == 1:
        return jnp.take(rows[0, :, 0], index, 1, mode="clip").swapaxes(0, 1)
    return jnp.take_along_axis(rows, index[:, None], -1, mode="clip")


def _forward(rows, index):
    return look_up(rows, index), (rows, index)


def _backward(residuals, d_out):
    rows, index = residuals
    places = jnp.arange(rows.shape[-1], dtype=index.dtype)

    def one(query):
        index, d_out = query  # [B M], [B H M]
        hot = (index[..., None] == places).astype(jnp.float32)
        return jnp.einsum("bhm,bmk->bhk", d_out, hot)

    queries = jnp.moveaxis(index, 1, 0), jnp.moveaxis(d_out, 2, 0)
    d_rows = jnp.moveaxis(lax.map(one, queries, batch_size=ROWS), 0, 2)
    shared = tuple(axis for axis in (0, 2) if rows.shape[axis] == 1)
    return jnp.sum(d_rows, shared, keepdims=True), None


look_up.defvjp(_forward, _backward)
