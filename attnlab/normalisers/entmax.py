"""Sparse weights: logits projected onto the simplex, a little or fully."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from attnlab.core import Array, Normaliser
from attnlab.errors import UserError
from attnlab.registry import register

STEPS = 64
"""More Newton steps than any row takes: a row of n keys takes some ln(n) + 5."""


@register
@dataclass(frozen=True)
class Entmax(Normaliser):
    """Sparse weights: p_i = [(α − 1) z_i − τ]₊^(1 / (α − 1)) with τ such that Σ p = 1.

    α -> 1 is softmax, α = 2 sparsemax. Keys far enough below the best get exactly 0: with α = 1.5
    one key with margin m over any number of equal ones keeps at least m²/4, all from m = 2 on.
    τ by Newton's method from below, where Σ p − 1 is convex and falling, so that steps never pass
    the root and every row stops by itself. With s = p^(2 − α): dp = s (dz − Σ s dz / Σ s), finite
    at zeros and ties.
    A mechanism that attends in one pass hosts it. Shapes: z [B H N M] -> [B H N M]. No parameters;
    O(N M) a step. Raises `UserError` unless 1 < alpha <= 2.
    Source: Peters et al., arXiv 1905.05702; Blondel et al., 1805.09717.
    """

    alpha: float = 1.5

    separable = False
    whole = True

    def __post_init__(self):
        if not 1 < self.alpha <= 2:
            raise UserError(f"normaliser entmax: alpha={self.alpha}; use 1 < alpha <= 2")

    def weights(self, params, z, seen):
        return project(self.alpha, z, seen)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def project(alpha: float, z: Array, seen: Array) -> Array:
    """The α-entmax of the last axis of ``z`` [.. M] over the keys ``seen``, 0 elsewhere; a row that
    sees none is 0."""
    return _project(alpha, z, seen)[0]


def _project(alpha: float, z: Array, seen: Array) -> tuple[Array, Array]:
    """(p, s): the weights and p^(2 − α), which is 0 where p is."""
    power = 1.0 / (alpha - 1.0)
    exponent = int(power - 1) if power.is_integer() else power - 1
    z = (alpha - 1.0) * (z - jnp.max(z, -1, keepdims=True))

    def at(threshold: Array) -> tuple[Array, Array]:
        rest = jnp.where(seen, jnp.maximum(z - threshold, 0.0), 0.0)
        slope = jnp.where(rest > 0, rest**exponent, 0.0)
        return slope * rest, slope

    def step(carry):
        threshold, _, steps = carry
        p, slope = at(threshold)
        excess = jnp.sum(p, -1, keepdims=True) - 1.0
        fall = power * jnp.sum(slope, -1, keepdims=True)
        # A row at its root stays there, so that no row depends on how long another takes.
        further = threshold + jnp.maximum(excess, 0.0) / jnp.where(fall > 0, fall, 1.0)
        return further, jnp.any(further > threshold), steps + 1

    start = (jnp.full((*z.shape[:-1], 1), -1.0), jnp.array(True), 0)
    threshold, *_ = jax.lax.while_loop(lambda c: c[1] & (c[2] < STEPS), step, start)
    return at(threshold)


@project.defjvp
def _derivative(alpha, primals, tangents):
    z, seen = primals
    p, s = _project(alpha, z, seen)
    total = jnp.sum(s, -1, keepdims=True)
    mean = jnp.sum(s * tangents[0], -1, keepdims=True) / jnp.where(total > 0, total, 1.0)
    return p, s * (tangents[0] - mean)
