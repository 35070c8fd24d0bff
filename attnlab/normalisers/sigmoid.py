"""Weights that do not compete."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Normaliser
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Sigmoid(Normaliser):
    """Each key weighed by itself: p = σ(z − ln n) with n the keys that the query sees.

    The bias makes a row of equal logits 0 sum to about one: n / (n + 1). A key's weight does not
    depend on the others' logits, which does not save it from dilution. Weights need not sum to one.
    n counts what masks and patterns leave, in this row.
    A mechanism that attends in one pass hosts it. Shapes: z [B H N M] -> [B H N M]. No parameters;
    O(N M). Source: Ramapuram et al., arXiv 2409.04431.
    """

    separable = False
    whole = True

    def weights(self, params, z, seen):
        count = jnp.sum(seen, -1, keepdims=True).astype(jnp.float32)
        return jnp.where(seen, jax.nn.sigmoid(z - jnp.log(jnp.maximum(count, 1.0))), 0.0)
