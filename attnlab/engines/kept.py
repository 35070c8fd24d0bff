"""A softmax that keeps its weights for the backward pass: for few enough of them, as between all
tokens and some rows that stand for them."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array


def softmax(z: Array, seen: Array, axis: int) -> Array:
    """p = softmax(z) along ``axis`` -1 or -2 of [B H n m], where ``seen`` (bool, broadcastable to
    that); 0 elsewhere, and along what sees nothing.

        dz = p ∘ (dp − Σ p ∘ dp)
    """
    return _softmax(z, seen, axis)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _softmax(z: Array, seen: Array, axis: int) -> Array:
    return jnp.where(seen, jax.nn.softmax(jnp.where(seen, z, MASK), axis), 0)


def _forward(z: Array, seen: Array, axis: int) -> tuple[Array, Array]:
    # Without the barrier XLA would take each exp again in every product of the backward pass.
    p = lax.optimization_barrier(_softmax(z, seen, axis))
    return p, p


def _backward(axis: int, p: Array, dp: Array) -> tuple[Array, None]:
    sums = "...nm,...nm->...n" if axis == -1 else "...nm,...nm->...m"
    return p * (dp - jnp.expand_dims(jnp.einsum(sums, p, dp), axis)), None


_softmax.defvjp(_forward, _backward)
