"""Softmax with one more key for each head, learned and without a value: a place for the rest."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.core import MASK, Array, Cost, Dims, Mechanism, Queries, Result, Rule, count_pairs
from attnlab.engines import dense, ring, segments
from attnlab.refusals import refuse_normaliser
from attnlab.registry import register


@register
@dataclass(frozen=True)
class KeyBias(Mechanism):
    """Exact attention in which a head may leave a part of its row unspent, as each query decides.

        p_j = e^(z_j) / (e^s + Σ_m e^(z_m)),   s = scale q·k*,   k* learned for each head

    which is softmax over one more key, whose value is 0. What a head has no use for goes there, and
    no token has to serve as a sink. With k* = 0 it is normaliser softmax_plus_one; where s falls,
    softmax. s is that of the query before it is rotated, since k* stands nowhere: outputs depend on
    distances alone. k* starts at a standard deviation of 0.02.
    Shapes: queries [B N H D], keys [B M G D], values [B M G E] -> [B N H E]. The learned key counts
    in ``lse``; ``probs`` leave it out, so that a row sums to less than 1.
    Cost: O(N M (D + E)) time, O(N + M) memory; decoding keeps all keys and values. Parameters: k*
    [H D]. Raises `UserError`, when called, for normalisers and positions that need whole rows.
    Source: Gu et al., arXiv 2410.10781 (K biases); Sun et al., arXiv 2402.17762.
    """

    cost = Cost(time=2, memory=1, state=1)
    spreads = True

    def init(self, key: Array, dims: Dims):
        return {"key": 0.02 * jax.random.normal(key, (dims.heads, dims.key_dim))}

    def __call__(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_normaliser("key_bias", rule)
        if rule.observed:
            return self.reference(params, queries, keys, rule, state)
        out, lse = ring.attend(queries, keys, segments.part_of(rule))
        unspent = _logit(params["key"], queries, rule)
        spent = jax.nn.sigmoid(lse - unspent).swapaxes(1, 2)[..., None]
        out = rule.tap("heads", (spent * out).astype(queries.q.dtype))
        return Result(out, state, {"lse": jnp.logaddexp(lse, unspent)})

    def reference(self, params, queries, keys, rule, state=(), *, x=None, key=None):
        refuse_normaliser("key_bias", rule)
        z = rule.logits(queries, keys)
        whole = jnp.concatenate([_logit(params["key"], queries, rule)[..., None], z], -1)
        lse = jax.nn.logsumexp(whole, -1)
        probs = rule.tap("probs", jnp.where(z > MASK / 2, jnp.exp(z - lse[..., None]), 0))
        out = dense.mix(rule, probs, keys.cleared().v, queries.pos, keys.pos)
        return Result(
            rule.tap("heads", out.astype(queries.q.dtype)), state, {"lse": lse, "probs": probs}
        )

    def flops(self, dims: Dims, length: int, causal: bool = True) -> float:
        pairs = (dims.key_dim + dims.value_dim) * count_pairs(length, None, causal)
        return 2.0 * dims.heads * (pairs + length * dims.key_dim)


def _logit(key: Array, queries: Queries, rule: Rule) -> Array:
    """s: f32 [B H N]."""
    q = queries.cleared().q
    factor = rule.normaliser.scale(rule.normaliser_params, queries.pos, rule.causal)
    q = q if factor is None else (q * factor[..., None]).astype(q.dtype)
    k = jnp.broadcast_to(key.astype(q.dtype), (q.shape[0], *key.shape))[:, :, None]
    return rule.product(q.swapaxes(1, 2), k)[..., 0]
