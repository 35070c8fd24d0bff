"""The decoding state of `bucketed`: the newest C tokens of every bucket, in rings.

A new token reads R rings of C slots, whatever the length of the past. A token found in several of
them counts once: with N_j the number of rings that show it, softmax over z_j − ln N_j.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array, Dims, Keys, Queries, Rule
from attnlab.engines import bucketed, sorting


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
    """What `bucketed.attend` gives the tokens by `sorting.plan_runs`, and the rings with them in
    it. ``buckets`` [R B H N]; other shapes as there.

    A prompt, which finds the rings of all rows empty, is read at once, at the cost of the engine.
    Later tokens are read one after the other, for O(R C (R C + D + E)) each, as what several rounds
    found shows by comparing all with all.
    """
    args = rings, queries.cleared(), keys.cleared(), rule, buckets
    if queries.pos.shape[1] == 1 or not rule.causal:
        return _read_singly(*args)
    return lax.cond(jnp.any(rings.written > 0), _read_singly, _read_whole, *args)


def _read_whole(rings: Rings, queries: Queries, keys: Keys, rule: Rule, buckets: Array):
    K, C = rings.pos.shape[3:]
    plan, reach = sorting.plan_runs(buckets, K, C, queries, rule.causal)
    out, _ = bucketed.attend(queries, keys, rule, plan, reach)
    out = jnp.where((queries.seg >= 0)[..., None, None], out, 0)
    return out, _fill(rings, keys, rule, buckets)


def _fill(rings: Rings, keys: Keys, rule: Rule, buckets: Array) -> Rings:
    """Empty rings with the newest tokens of a prompt in them, where `_write` puts them."""
    B, H, R, K, C = rings.pos.shape
    bucket = jnp.moveaxis(buckets, 0, 2)  # [B H R N]
    bucket = jnp.where((keys.seg >= 0)[:, None, None], bucket, K)
    order = jnp.argsort(bucket, -1, stable=True)
    ends = sorting.search(jnp.take_along_axis(bucket, order, -1), jnp.arange(K + 1))
    written = ends[..., 1:] - ends[..., :-1]
    age = jnp.arange(C)  # the newest of a bucket is 0
    there = age < written[..., None]  # [B H R K C]
    token = jnp.where(there, ends[..., 1:, None] - 1 - age, 0)
    token = jnp.take_along_axis(order, token.reshape(B, H, R, K * C), -1)
    slot = (written[..., None] - 1 - age) % C  # each once
    by_slot = jnp.argsort(slot, -1)
    token, there = (
        jnp.take_along_axis(z, by_slot, -1) for z in (token.reshape(there.shape), there)
    )

    def newest(z: Array) -> Array:
        """[B N G X] or [B N] -> [B H R K C X] or [B H R K C]."""
        z = z[:, :, None] if z.ndim == 2 else jnp.repeat(z, H // z.shape[2], 2)
        z = jnp.broadcast_to(z, (*z.shape[:2], H, *z.shape[3:])).swapaxes(1, 2)
        return jax.vmap(jax.vmap(lambda row, at: row[at]))(z, token)

    def put(ring: Array, z: Array) -> Array:
        where = there.reshape(*there.shape, *[1] * (z.ndim - there.ndim))
        return jnp.where(where, z.astype(ring.dtype), ring)

    k = rule.rotate(keys.k, keys.pos, "key")
    found = zip(rings[:4], (k, keys.v, keys.pos, keys.seg))
    k, v, pos, seg = (put(ring, newest(z)) for ring, z in found)
    return Rings(k, v, pos, seg, written.astype(rings.written.dtype))


def _read_singly(rings: Rings, queries: Queries, keys: Keys, rule: Rule, buckets: Array):
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
    z = bucketed.local_logits(rule, q.swapaxes(0, 1)[:, :, None], keys, q_pos, k_pos)[:, :, 0]
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
