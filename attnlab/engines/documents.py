"""One document after the other: for what is computed from a whole document and is too large to keep
for every token."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import Array


def sum_over(function: Callable, q_seg: Array, k_seg: Array, arrays: Any) -> Array:
    """Σ_d function(queries of document d, its keys, arrays), d over the documents of each row.

    ``q_seg`` [B N] and ``k_seg`` [B M] are segments (< 0: empty slot); ``function`` gets them as
    masks, bool in the same shapes, and the pytree ``arrays``, and returns an array that is 0 where
    the document is not. Cost: one call a document, of the row that holds most of them, and two in
    the backward pass, which keeps nothing but ``arrays``.
    """
    number = _numbered(jnp.concatenate([q_seg, k_seg], 1))
    return _sum(function, number[:, : q_seg.shape[1]], number[:, q_seg.shape[1] :], arrays)


def _numbered(seg: Array) -> Array:
    """Segments [B N] as 0, 1, 2, ... in their order, empty slots -1."""
    ordered = jnp.sort(jnp.where(seg >= 0, seg, jnp.iinfo(jnp.int32).max), 1)
    rank = jnp.cumsum(jnp.pad(ordered[:, 1:] != ordered[:, :-1], ((0, 0), (1, 0))), 1)
    place = jax.vmap(jnp.searchsorted)(ordered, seg)
    return jnp.where(seg >= 0, jnp.take_along_axis(rank, place, 1), -1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sum(function: Callable, q_number: Array, k_number: Array, arrays: Any) -> Array:
    def step(d: Array, total: Array) -> Array:
        return total + function(q_number == d, k_number == d, arrays)

    like = jax.eval_shape(function, q_number == 0, k_number == 0, arrays)
    return lax.fori_loop(0, jnp.max(q_number) + 1, step, jnp.zeros(like.shape, like.dtype))


def _forward(function, q_number, k_number, arrays):
    return _sum(function, q_number, k_number, arrays), (q_number, k_number, arrays)


def _backward(function, residuals, d_out):
    q_number, k_number, arrays = residuals

    def step(d: Array, total: Any) -> Any:
        part = partial(function, q_number == d, k_number == d)
        return jax.tree.map(jnp.add, total, jax.vjp(part, arrays)[1](d_out)[0])

    start = jax.tree.map(jnp.zeros_like, arrays)
    return None, None, lax.fori_loop(0, jnp.max(q_number) + 1, step, start)


_sum.defvjp(_forward, _backward)
