"""The decoding state of `bucketed`: the newest C tokens of every bucket, in rings.

A new token reads R rings of C slots, whatever the length of the past. A token found in several of
them counts once: with N_j the number of rings that show it, softmax over z_j − ln N_j.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array, Dims, Keys, Queries, Rule
from attnlab.engines.bucketed import local_logits


class Rings(NamedTuple):
    """``k`` [B H R K C D] as the rule has rotated them, ``v`` [B H R K C E], ``pos``, ``seg``
    [B H R K C] (``seg`` < 0: empty) of K buckets in R rounds; ``written`` [B H R K] counts."""

    k: Array
    v: Array
    pos: Array
    seg: Array
    written: Array


def empty(
    dims: Dims, batch: int, rounds: int, buckets: int, length: int, dtype: Any = jnp.float32
) -> Rings:
    """Rings of ``length`` empty slots."""
    shape = batch, dims.heads, rounds, buckets
    pos = jnp.zeros((*shape, length), jnp.int32)
    k = jnp.zeros((*pos.shape, dims.key_dim), dtype)
    v = jnp.zeros((*pos.shape, dims.value_dim), dtype)
    return Rings(k, v, pos, pos - 1, jnp.zeros(shape, jnp.int32))


def attend(
    rings: Rings, queries: Queries, keys: Keys, rule: Rule, buckets: Array
) -> tuple[Array, Rings]:
    """One token after the other: what `bucketed.attend` gives them by a plan of `sorting`, and
    the rings with them in it. ``buckets`` [R B H N]; other shapes as there. Cost of a token:
    O(R C (R C + D + E)), as what several rounds found shows by comparing all with all."""
    queries, keys = queries.cleared(), keys.cleared()
    H = queries.q.shape[2]
    q = rule.rotate(queries.q, queries.pos, "query")
    k = rule.rotate(keys.k, keys.pos, "key")
    k, v = (jnp.repeat(z, H // z.shape[2], 2) for z in (k, keys.v))
    tokens = (q, k, v, queries.pos, queries.seg, jnp.moveaxis(buckets, 0, -1).swapaxes(1, 2))
    by_time = tuple(jnp.moveaxis(z, 1, 0) for z in tokens)

    def step(rings, token):
        out = _read(rings, rule, *token)
        return _write(rings, *token[1:]), out

    rings, out = lax.scan(step, rings, by_time)
    return rule.tap("heads", jnp.moveaxis(out, 0, 1).astype(queries.q.dtype)), rings


def _read(rings: Rings, rule: Rule, q, k, v, pos, seg, bucket) -> Array:
    """One token a row: q [B H D], v [B H E], pos, seg [B], bucket [B H R] -> out [B H E]."""
    B, H, R = bucket.shape

    def visited(z: Array) -> Array:
        """[B H R K C ...] -> [H B (R C) ...]."""
        at = bucket.reshape(B, H, R, *[1] * (z.ndim - 3))
        z = jnp.take_along_axis(z, at, 3)
        return z.reshape(B, H, R * z.shape[4], *z.shape[5:]).swapaxes(0, 1)

    keys, values, k_pos, k_seg = (visited(z) for z in rings[:4])
    q_pos, q_seg = (jnp.broadcast_to(z[None, :, None], (H, B, 1)) for z in (pos, seg))
    seen = jax.vmap(rule.visible)(q_pos, q_seg, k_pos, k_seg)[:, :, 0]
    alike = (k_pos[..., :, None] == k_pos[..., None, :]) & seen[..., None, :]
    often = jnp.maximum(jnp.sum(alike, -1), 1).astype(jnp.float32)
    z = local_logits(rule, q.swapaxes(0, 1)[:, :, None], keys, q_pos, k_pos)[:, :, 0]
    z = jnp.where(seen, z - jnp.log(often), MASK)
    weight = jnp.where(seen, jnp.exp(z - jnp.max(z, -1, keepdims=True)), 0.0)
    total = jnp.sum(weight, -1, keepdims=True)
    p = weight / jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("hbm,hbme->hbe", p, values, preferred_element_type=jnp.float32)
    out = jnp.where(total > 0, out, v.swapaxes(0, 1)).swapaxes(0, 1)
    return jnp.where((seg >= 0)[:, None, None], out, 0.0)


def _write(rings: Rings, k, v, pos, seg, bucket) -> Rings:
    """The rings with one more token a row over the oldest of its bucket; an empty one leaves no
    trace."""
    B, H, R = bucket.shape
    C = rings.pos.shape[-1]
    count = jnp.take_along_axis(rings.written, bucket[..., None], -1)[..., 0]
    full = jnp.broadcast_to((seg >= 0)[:, None, None], bucket.shape)
    slot = jnp.where(full, count % C, C)  # slot C does not exist: dropped
    at = (*jnp.ix_(jnp.arange(B), jnp.arange(H), jnp.arange(R)), bucket)

    def put(ring: Array, z: Array) -> Array:
        return ring.at[(*at, slot)].set(z.astype(ring.dtype), mode="drop")

    return Rings(
        put(rings.k, jnp.broadcast_to(k[:, :, None], (B, H, R, k.shape[-1]))),
        put(rings.v, jnp.broadcast_to(v[:, :, None], (B, H, R, v.shape[-1]))),
        put(rings.pos, jnp.broadcast_to(pos[:, None, None], bucket.shape)),
        put(rings.seg, jnp.broadcast_to(seg[:, None, None], bucket.shape)),
        rings.written.at[at].add(full.astype(jnp.int32)),
    )
