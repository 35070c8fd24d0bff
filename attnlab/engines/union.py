"""What `bucketed` computes, literally: dense masks, counted pairs, one softmax; its oracle."""

import jax
import jax.numpy as jnp

from attnlab.core import MASK, Array, Keys, Queries, Rule
from attnlab.engines import report_use


def meet(buckets: Array, length: int, queries: Queries) -> Array:
    """Which tokens share a bucket [B H N] and a document, with fewer than ``length`` of the same
    between them: bool [B H N N]."""
    seg, pos = queries.seg[:, None], queries.pos[:, None]
    same = (buckets[..., :, None] == buckets[..., None, :]) & (
        seg[..., :, None] == seg[..., None, :]
    )
    same &= (seg >= 0)[..., None, :]
    number = jnp.sum(same & (pos[..., None, :] <= pos[..., :, None]), -1)
    return same & (jnp.abs(number[..., :, None] - number[..., None, :]) <= length)


def attend(queries: Queries, keys: Keys, rule: Rule, times: Array) -> tuple[Array, Array, Array]:
    """Softmax over the keys that a query meets and the rule shows, as many ``times`` each (int or
    bool [B H N N]); over the token itself only where there is no other.

    Returns ``out`` [B N H E], ``lse`` [B H N] over others (`MASK` where there are none) and
    ``probs`` [B H N N]. Cost: O(N²) time and memory.
    """
    report_use("union", "XLA")
    itself = jnp.eye(times.shape[-1], dtype=bool)
    others = (times > 0) & rule.allowed(queries, keys)[:, None] & ~itself
    some = jnp.any(others, -1, keepdims=True)
    seen = jnp.where(some, others, itself & (queries.seg >= 0)[:, None, :, None])
    often = jnp.log(jnp.maximum(times, 1).astype(jnp.float32))
    z = jnp.where(seen, rule.logits(queries, keys) + often, MASK)
    top = jax.lax.stop_gradient(jnp.max(z, -1, keepdims=True))
    weight = jnp.where(seen, jnp.exp(z - top), 0.0)
    total = jnp.sum(weight, -1, keepdims=True)
    safe = jnp.where(total > 0, total, 1.0)
    probs = rule.tap("probs", weight / safe)
    lse = jnp.where(some, top + jnp.log(safe), MASK)[..., 0]
    v = jnp.repeat(keys.cleared().v.astype(jnp.float32), probs.shape[1] // keys.v.shape[2], 2)
    out = jnp.einsum("bhnm,bmhe->bnhe", probs, v)
    return rule.tap("heads", out.astype(queries.q.dtype)), lse, probs
