"""Softmax attention with the whole [N, M] array in memory: the oracle, and the form that taps on
logits and probabilities need."""

import jax
import jax.numpy as jnp

from attnlab.core import MASK, Array, Keys, Queries, Rule
from attnlab.engines import report_use


def attend(
    queries: Queries, keys: Keys, rule: Rule, among: Array | None = None
) -> tuple[Array, Array, Array]:
    """softmax(logits) v, row by row; a row with no visible key gives 0.

    ``among``, bool and broadcastable to [B H N M], narrows what the rule allows, by content.
    Returns ``out`` [B N H E] in the dtype of the queries, ``lse`` [B H N] f32 (`MASK` for an empty
    row) and ``probs`` [B H N M] f32. Cost: O(N M) time and memory.
    """
    report_use("dense", "XLA")
    seen = rule.allowed(queries, keys)[:, None]
    z = rule.logits(queries, keys)
    if among is not None:
        seen = seen & among
        z = jnp.where(seen, z, MASK)
    # Any shift gives the same result, so it has no gradient; that of a maximum is NaN when the
    # compiler rounds the logits differently where it looks for the maximum again.
    top = jax.lax.stop_gradient(jnp.max(z, -1, keepdims=True))
    weight = jnp.where(seen, jnp.exp(z - top), 0.0)
    total = jnp.sum(weight, -1, keepdims=True)
    probs = rule.tap("probs", weight / jnp.where(total > 0, total, 1.0))
    lse = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), MASK)[..., 0]

    B, M, G, E = keys.v.shape
    H, N = queries.q.shape[2], queries.q.shape[1]
    out = jnp.einsum(
        "bgrnm,bmge->bngre",
        probs.reshape(B, G, H // G, N, M),
        keys.cleared().v.astype(jnp.float32),
    ).reshape(B, N, H, E)
    return rule.tap("heads", out.astype(queries.q.dtype)), lse, probs
