"""Prefix tuning: learned keys and values before the text, written out."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import Cost, Mechanism, Result, count_pairs
from attnlab.engines import blockwise, dense, parts
from attnlab.engines.segments import part_of
from attnlab.refusals import refuse_normaliser, refuse_taps
from attnlab.registry import register


@register
@dataclass(frozen=True)
class Prefix(Mechanism):
    """Softmax over the visible keys and ``length`` learned ones, which every query sees.

    Learned keys [P H D] have no position, so queries meet them unrotated; their values are 0 at the
    start. Source: Li & Liang, arXiv 2101.00190, with a prefix for each layer and head.
    """

    length: int = 16

    cost = Cost(time=2, memory=1, state=1)

    def init(self, key, dims):
        keys = jax.random.normal(key, (self.length, dims.heads, dims.key_dim))
        return {"keys": keys, "values": jnp.zeros((*keys.shape[:2], dims.value_dim))}

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        return self._beside(params, queries, rule, blockwise.attend(queries, keys, part_of(rule)))

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        return self._beside(params, queries, rule, dense.attend(queries, keys, part_of(rule)))

    def _beside(self, params, queries, rule, attended):
        refuse_normaliser("prefix", rule)
        refuse_taps("prefix", rule)
        out, lse = attended[0].swapaxes(1, 2), attended[1]
        q = queries.cleared().q.astype(jnp.float32).swapaxes(1, 2)
        k = params["keys"].swapaxes(0, 1)
        k = jnp.broadcast_to(k, (q.shape[0], *k.shape))
        z = rule.product(q, k)
        before = jnp.einsum("bhnp,phe->bhne", jax.nn.softmax(z, -1), params["values"])
        out, lse = parts.merge((out, before), (lse, jax.nn.logsumexp(z, -1)))
        out = out.swapaxes(1, 2).astype(queries.q.dtype)
        return Result(rule.tap("heads", out), (), {"lse": lse})

    def flops(self, dims, length, causal=True):
        pairs = count_pairs(length, None, causal) + length * self.length
        return 2.0 * dims.heads * (dims.key_dim + dims.value_dim) * pairs
