"""Attention with the whole [N, M] array in memory: the oracle, and the form that taps on logits
and probabilities need."""

import jax
import jax.numpy as jnp

from attnlab.core import MASK, Array, Keys, Queries, Rule
from attnlab.engines import report_use


def attend(
    queries: Queries,
    keys: Keys,
    rule: Rule,
    among: Array | None = None,
    added: Array | None = None,
) -> tuple[Array, Array, Array]:
    """weights(logits) v, row by row, softmax unless the rule says otherwise; a row with no visible
    key gives 0.

    ``among``, bool and broadcastable to [B H N M], narrows what the rule allows, by content;
    ``added``, f32 and alike, is added to the logits.
    Returns ``out`` [B N H E] in the dtype of the queries, ``lse`` [B H N] f32 (log-sum-exp of the
    logits whatever the normaliser, `MASK` for an empty row) and ``probs`` [B H N M] f32. Cost:
    O(N M) time and memory.
    """
    report_use("dense", "XLA")
    seen = rule.allowed(queries, keys)[:, None]
    z = rule.logits(queries, keys)
    if among is not None or added is not None:
        seen = seen if among is None else seen & among
        z = jnp.where(seen, z if added is None else z + added, MASK)
    probs = rule.tap("probs", rule.weights(z, seen))
    out = mix(rule, probs, keys.cleared().v.astype(jnp.float32), queries.pos, keys.pos)
    return rule.tap("heads", out.astype(queries.q.dtype)), log_sum(z, seen), probs


def log_sum(z: Array, seen: Array) -> Array:
    """ln Σ exp(z) over the keys seen: [B H N M], [B 1 N M] -> [B H N]; `MASK` for an empty row."""
    top = jax.lax.stop_gradient(jnp.max(z, -1, keepdims=True))
    total = jnp.sum(jnp.where(seen, jnp.exp(z - top), 0.0), -1, keepdims=True)
    return jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), MASK)[..., 0]


def mix(rule: Rule, probs: Array, v: Array, q_pos: Array, k_pos: Array) -> Array:
    """Σ probs v, plus what the position module adds: [B H N M], [B M G E] -> f32 [B N H E]."""
    B, M, G, E = v.shape
    H, N = probs.shape[1:3]
    out = jnp.einsum(
        "bgrnm,bmge->bngre",
        probs.reshape(B, G, H // G, N, M).astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    ).reshape(B, N, H, E)
    extra = rule.position.row_values(rule.params, probs, q_pos, k_pos)
    return out if extra is None else out + extra
