"""Tokens of one set found in another by segment and position, and one softmax over sets of keys of
which each is asked by queries of its own."""

import dataclasses

import jax
import jax.numpy as jnp

from attnlab.core import MASK, Array, Keys, Queries, Rule
from attnlab.engines import dense


def latest(pos: Array, seg: Array, among_pos: Array, among_seg: Array) -> Array:
    """The slot of the newest token of document ``seg`` [B N] at ``pos`` or before, among tokens
    [B M]: int32 [B N], -1 where there is none or the slot that asks is empty. Cost: a sort,
    O((N + M) log(N + M))."""
    M = among_pos.shape[1]
    both_pos = jnp.concatenate([among_pos, pos], 1)
    both_seg = jnp.concatenate([among_seg, seg], 1)
    asks = jnp.broadcast_to(jnp.arange(both_pos.shape[1]) >= M, both_pos.shape)
    order = jnp.lexsort((asks, both_pos, both_seg))
    newest = jax.lax.cummax(jnp.where(order < M, jnp.arange(order.shape[1]), -1), axis=1)
    slot = jnp.take_along_axis(order, jnp.maximum(newest, 0), 1)
    slot = jnp.take_along_axis(slot, jnp.argsort(order, 1)[:, M:], 1)
    slot = jnp.minimum(slot, M - 1)
    found = (seg >= 0) & (jnp.take_along_axis(among_seg, slot, 1) == seg)
    return jnp.where(found & (jnp.take_along_axis(among_pos, slot, 1) <= pos), slot, -1)


def locate(pos: Array, seg: Array, among_pos: Array, among_seg: Array) -> Array:
    """The slot of the token at ``pos`` of document ``seg`` [B N] among tokens [B M]: int32 [B N],
    -1 where there is none or the slot that asks is empty. Cost as `latest`."""
    slot = latest(pos, seg, among_pos, among_seg)
    same = jnp.take_along_axis(among_pos, jnp.maximum(slot, 0), 1) == pos
    return jnp.where(same, slot, -1)


def attend_densely(rule: Rule, *parts: tuple[Queries, Keys, Array]) -> tuple[Array, Array, Array]:
    """One softmax over the keys of all parts, side by side, with [B H N M] arrays.

    A part has the queries that ask it, one for every row of the result, its keys, and which of
    those that the rule allows count: bool [B N M]. Returns ``out``, ``lse`` and ``probs`` as
    `dense.attend`.
    """
    bare = dataclasses.replace(rule, taps=())
    met = ((bare.logits(q, k), bare.allowed(q, k) & among, k) for q, k, among in parts)
    out, lse, probs = weigh(rule, *met)
    return out.astype(parts[0][0].q.dtype), lse, probs


def weigh(rule: Rule, *met: tuple[Array, Array, Keys]) -> tuple[Array, Array, Array]:
    """One softmax over the keys of several sets, side by side, from the logits [B H N M] that
    queries have with each and which of them are seen [B N M]. Returns ``out`` [B N H E] f32,
    ``lse`` and ``probs`` as `dense.attend`; the rule taps and normalises."""
    logits, allowed, sets = zip(*met)
    seen = jnp.concatenate(allowed, -1)[:, None]
    z = jnp.where(seen, rule.tap("logits", jnp.concatenate(logits, -1)), MASK)
    probs = rule.tap("probs", rule.weights(z, seen))
    v = jnp.concatenate([keys.cleared().v.astype(jnp.float32) for keys in sets], 1)
    v = jnp.repeat(v, probs.shape[1] // v.shape[2], 2)
    out = jnp.einsum("bhnm,bmhe->bnhe", probs, v)
    return rule.tap("heads", out), dense.log_sum(z, seen), probs
