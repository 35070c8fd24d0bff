"""One softmax from several: attention over disjoint sets of keys, merged by their log-sum-exp."""

from collections.abc import Iterable
from functools import reduce

import jax
import jax.numpy as jnp

from attnlab.core import MASK, Array

Arrays = tuple[Array, ...]


def merge(outs: Iterable[Array], lses: Iterable[Array]) -> tuple[Array, Array]:
    """The softmax over the union of disjoint sets of keys, from the softmax over each.

        lse = ln Σ_p e^(lse_p),   out = Σ_p w_p out_p,   w_p = e^(lse_p − lse)
        d lse_p = w_p (d out · (out_p − out) + d lse),   d out_p = w_p d out

    P times ``outs`` [... E] and ``lses`` [...] (`MASK` where a part saw no key); returns ``out``
    [... E] f32, 0 where no part saw a key, and ``lse`` [...]. Cost O(P) per row.
    """
    return _merge(tuple(outs), tuple(lses))


@jax.custom_vjp
def _merge(outs: Arrays, lses: Arrays) -> tuple[Array, Array]:
    top = reduce(jnp.maximum, lses)
    weights = [jnp.where(lse > MASK, jnp.exp(lse - top), 0.0) for lse in lses]
    total = sum(weights[1:], weights[0])
    safe = jnp.where(total > 0, total, 1.0)
    parts = [(w / safe)[..., None] * out.astype(jnp.float32) for w, out in zip(weights, outs)]
    return sum(parts[1:], parts[0]), jnp.where(total > 0, top + jnp.log(safe), MASK)


def _forward(outs: Arrays, lses: Arrays):
    out, lse = _merge(outs, lses)
    return (out, lse), (outs, lses, out, lse)


def _backward(kept, cotangents):
    outs, lses, out, lse = kept
    d_out, d_lse = cotangents

    def along(z: Array) -> Array:
        # A product and a sum would make an array of all the products on a CPU.
        return jnp.einsum("...e,...e->...", d_out, z.astype(jnp.float32))

    weights = [jnp.where(z > MASK, jnp.exp(z - lse), 0.0) for z in lses]
    rest = d_lse - along(out)
    d_lses = tuple(w * (along(z) + rest) for w, z in zip(weights, outs))
    return tuple((w[..., None] * d_out).astype(z.dtype) for w, z in zip(weights, outs)), d_lses


_merge.defvjp(_forward, _backward)
