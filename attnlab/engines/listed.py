"""Exact attention in which every query of every head has a list of keys of its own."""

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array, Keys, Queries, Rule
from attnlab.engines import report_use
from attnlab.engines.tiling import cut

TOGETHER = 64
"""Queries whose keys are gathered at once: [B TOGETHER H W] keys and values are alive."""


def attend(queries: Queries, keys: Keys, rule: Rule, slots: Array) -> tuple[Array, Array, Array]:
    """weights(logits) v over the keys in ``slots`` int32 [B N H W], each at most once; < 0 is none.

    What the rule hides is not seen, and a row without a visible key gives 0. Returns ``out``
    [B N H E] f32, the weights [B N H W] f32 and which slots are seen, bool. Taps are not served,
    nor position modules that want whole rows. Cost: O(N W (D + E)) time, O(N W) memory.
    """
    report_use("listed", "XLA")
    queries, keys = queries.cleared(), keys.cleared()
    N = slots.shape[1]
    q, k = rule.rotate(queries.q, queries.pos, "query"), rule.rotate(keys.k, keys.pos, "key")
    size = min(TOGETHER, N)

    @jax.checkpoint
    def some(rule: Rule, keys: Keys, part: tuple[Queries, Array]) -> tuple[Array, Array, Array]:
        return _attend(rule, keys, *part)

    asking = Queries(cut(q, size, 0), cut(queries.pos, size, 0), cut(queries.seg, size, -1))
    rotated = keys._replace(k=k)
    found = lax.map(lambda part: some(rule, rotated, part), (asking, cut(slots, size, -1)))

    def joined(z: Array) -> Array:
        return jnp.moveaxis(z, 0, 1).reshape(z.shape[1], -1, *z.shape[3:])[:, :N]

    out, probs, seen = map(joined, found)
    return out, probs, seen


def _attend(rule: Rule, keys: Keys, queries: Queries, slots: Array) -> tuple[Array, Array, Array]:
    B, C, H, D = queries.q.shape
    G, W = keys.k.shape[2], slots.shape[-1]
    at, row = jnp.maximum(slots, 0), jnp.arange(B)[:, None, None, None]
    group = (jnp.arange(H) // (H // G))[:, None]
    k, v = (z[row, at, group] for z in (keys.k, keys.v))
    pos, seg = keys.pos[row, at], jnp.where(slots < 0, -1, keys.seg[row, at])
    seen = rule.sees(queries.pos[..., None, None], queries.seg[..., None, None], pos, seg)
    z = rule.product(queries.q.reshape(-1, 1, 1, D), k.reshape(-1, 1, W, D)).reshape(B, C, H, W)
    if rule.position.biased:
        z += _bias(rule, queries, pos)
    z, shown = (jnp.moveaxis(a, 2, 1) for a in (jnp.where(seen, z, MASK), seen))
    probs = jnp.moveaxis(rule.weights(z, shown), 1, 2)
    out = jnp.einsum(
        "bchw,bchwe->bche", probs.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return out, probs, seen


def _bias(rule: Rule, queries: Queries, pos: Array) -> Array:
    """`Rule.bias` of keys at ``pos`` [B C H W]: the module is asked once per head for that head
    alone, with a row for every query; what it computes for the others is left out."""
    B, C, H, W = pos.shape
    q, q_pos, bias = queries.q.reshape(B * C, H, 1, -1), queries.pos.reshape(-1, 1), []
    for h in range(H):
        one = rule.bias(q, q_pos, pos[:, :, h].reshape(-1, W))
        bias.append(jnp.broadcast_to(jnp.asarray(one), (B * C, H, 1, W))[:, h, 0])
    return jnp.stack(bias, 1).reshape(B, C, H, W)
