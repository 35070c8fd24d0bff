"""Kernelized relative positions, logarithmic form."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Array, Position
from attnlab.registry import register

LEAST = 0.01
"""Smallest initial p and a: a head that begins at 0 would hardly learn."""


def inverse_softplus(y: Array) -> Array:
    """x with ln(1 + eˣ) = y > 0."""
    return y + jnp.log(-jnp.expm1(-y))


@register
@dataclass(frozen=True)
class Kerple(Position):
    """A learned penalty that grows with the logarithm of the distance: −p_h ln(1 + a_h Δ).

    Δ = |pos_q − pos_k|; p, a > 0 per head, shared by all layers, as the softplus of the parameters
    ``p`` and ``a`` [H]; at first p ~ U(0, 2) and a ~ U(0, 1). Shapes: pos [B N], [B M] -> [B H N M]
    f32. Cost: one logarithm per logit. Extends beyond the training length.
    Source: Chi et al., arXiv 2205.09921.
    """

    biased = True
    shared = True

    def init(self, key, dims):
        p, a = jax.random.uniform(key, (2, dims.heads), minval=LEAST)
        return {"p": inverse_softplus(2.0 * p), "a": inverse_softplus(a)}

    def bias(self, params, q, q_pos, k_pos):
        distance = jnp.abs(q_pos[:, None, :, None] - k_pos[:, None, None, :]).astype(jnp.float32)
        p, a = (jax.nn.softplus(params[name])[:, None, None] for name in ("p", "a"))
        return -p * jnp.log(1.0 + a * distance)
