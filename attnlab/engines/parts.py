"""One softmax from several: attention over disjoint sets of keys, merged by their log-sum-exp."""

import jax
import jax.numpy as jnp

from attnlab.core import MASK, Array


def merge(outs: Array, lses: Array) -> tuple[Array, Array]:
    """The softmax over the union of disjoint sets of keys, from the softmax over each.

        lse = ln Σ_p e^(lse_p),   out = Σ_p e^(lse_p − lse) out_p

    ``outs`` [P ... E] and ``lses`` [P ...] (`MASK` where a part saw no key); returns f32 ``out``
    [... E], 0 where no part saw a key, and ``lse`` [...]. Cost O(P) per row.
    """
    top = jax.lax.stop_gradient(jnp.max(lses, 0))  # any shift gives the same result
    weight = jnp.where(lses > MASK, jnp.exp(lses - top), 0.0)
    total = jnp.sum(weight, 0)
    safe = jnp.where(total > 0, total, 1.0)
    out = jnp.sum(weight[..., None] * outs.astype(jnp.float32), 0) / safe[..., None]
    return out, jnp.where(total > 0, top + jnp.log(safe), MASK)
