"""Exact attention over a sequence that lies on several devices, keys passed round in a ring.

Each of P devices keeps its queries and meets the keys of all, its own first: after every part the
keys go on to the next device. Parts are merged by their log-sum-exp, and the backward pass goes
round once more, with the gradients of the keys travelling along:
    w_p = e^(lse_p − lse),  d out_p = w_p d out,  d lse_p = w_p (d out · (out_p − out) + d lse)
So no device ever holds more than two parts of the keys. The forward pass of a part is computed
again in the backward pass.

A causal rule leaves the last device P times the work of the first one. So blocks of half a part
change places first: device i holds the blocks i and 2 P − 1 − i, which are equal work. Tokens carry
their positions, and the mask follows them.
Source: Liu et al., arXiv 2310.01889; balance: Brandon et al., 2311.09431, with blocks as in
Dubey et al., 2407.21783.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from attnlab.core import MASK, Array, Keys, Queries, Rule
from attnlab.engines import blockwise, parts, report_use, sharded, ulysses
from attnlab.engines.sharded import SEQUENCE


def attend(
    queries: Queries, keys: Keys, rule: Rule, tile: int | None = None
) -> tuple[Array, Array]:
    """`blockwise.attend`, with the tokens split along the mesh axis ``seq`` if there is one.

    Shapes as there. A rule whose rows are no merger of parts is served by `ulysses`; one with taps
    on whole logits, lengths that the devices do not divide, and more keys than queries by
    `blockwise`. Cost on each device: its share of the pairs, O((N + M) / P) memory; it sends all
    keys and values past itself twice, forward and backward.
    """
    N, M = queries.pos.shape[1], keys.pos.shape[1]
    devices = sharded.count(N) if N == M else 1
    if devices == 1 or rule.observed:
        return blockwise.attend(queries, keys, rule, tile)
    if not rule.separable:
        return ulysses.attend(queries, keys, rule, tile)
    report_use("ring", f"{devices} devices")
    own = N // devices
    balanced = rule.causal and own % 2 == 0
    if balanced:
        tile = min(tile or own, own // 2)
    return sharded.attend(partial(_attend, devices, balanced, tile), queries, keys, rule)


def _attend(devices: int, balanced: bool, tile: int | None, queries: Queries, keys: Keys, rule):
    if balanced:
        queries, keys = (_folded(z, devices) for z in (queries, keys))
    out, lse = _round(devices, tile, rule, queries, keys)
    if balanced:
        out, lse = _unfolded(out, devices, 1), _unfolded(lse, devices, 2)
    return out.astype(queries.q.dtype), lse


def _turned(tree, devices: int):
    """What the device before this one had."""
    to_next = [(i, (i + 1) % devices) for i in range(devices)]
    return lax.ppermute(tree, SEQUENCE, to_next)


def _places(devices: int) -> list[list[tuple[int, int]]]:
    """Where each device's first and second half of its tokens go, so that device i has the blocks
    i and 2 P − 1 − i, the even one first."""
    blocks = [[2 * i + half for i in range(devices)] for half in (0, 1)]
    return [[(b // 2, min(b, 2 * devices - 1 - b)) for b in some] for some in blocks]


def _folded(tree, devices: int):
    """Tokens [B n ...] with their halves in the `_places` of balanced work."""

    def fold(z: Array) -> Array:
        halves = jnp.split(z, 2, 1)
        moved = (lax.ppermute(h, SEQUENCE, p) for h, p in zip(halves, _places(devices)))
        return jnp.concatenate(list(moved), 1)

    return jax.tree.map(fold, tree)


def _unfolded(z: Array, devices: int, axis: int) -> Array:
    """Halves of the tokens back where they came from."""
    halves = jnp.split(z, 2, axis)
    back = ([(there, here) for here, there in places] for places in _places(devices))
    moved = (lax.ppermute(half, SEQUENCE, places) for half, places in zip(halves, back))
    return jnp.concatenate(list(moved), axis)


def _visit(devices: int, tile: int | None, rule: Rule, queries: Queries, keys: Keys):
    """f32 ``out`` [B n H E] and ``lse`` [B H n] of a device's own queries and the keys of all."""
    return _forward(devices, tile, rule, queries, keys)[0]


def _forward(devices: int, tile: int | None, rule: Rule, queries: Queries, keys: Keys):
    def step(carry, _):
        keys, out, lse = carry
        coming = _turned(keys, devices)
        found, seen = blockwise.attend(queries, keys, rule, tile)
        out, lse = parts.merge((out, found.swapaxes(1, 2)), (lse, seen))
        return (coming, out, lse), None

    B, n, H, _ = queries.q.shape
    start = jnp.zeros((B, H, n, keys.v.shape[-1])), jnp.full((B, H, n), MASK)
    (_, out, lse), _ = lax.scan(step, (keys, *start), None, devices)
    out = out.swapaxes(1, 2)
    return (out, lse), (rule, queries, keys, out, lse)


def _backward(devices: int, tile: int | None, kept, cotangents):
    rule, queries, keys, out, lse = kept
    d_out, d_lse = cotangents
    rest = d_lse - jnp.einsum("bnhe,bnhe->bhn", d_out, out)

    def step(carry, _):
        keys, dk, dv, d_rule, dq = carry

        def attend_part(rule: Rule, q: Array, k: Array, v: Array) -> tuple[Array, Array]:
            asking, answering = queries._replace(q=q), keys._replace(k=k, v=v)
            return blockwise.attend(asking, answering, rule, tile)

        (part, seen), pull = jax.vjp(attend_part, rule, queries.q, keys.k, keys.v)
        weight = jnp.where(seen > MASK, jnp.exp(seen - lse), 0.0)
        along = jnp.einsum("bnhe,bnhe->bhn", d_out, part.astype(jnp.float32))
        d_part = weight.swapaxes(1, 2)[..., None] * d_out
        add = pull((d_part.astype(part.dtype), weight * (along + rest)))
        d_rule = jax.tree.map(jnp.add, d_rule, add[0])
        travelling = _turned((keys, dk + add[2], dv + add[3]), devices)
        return (*travelling, d_rule, dq + add[1]), None

    zeros = (jnp.zeros(z.shape) for z in (keys.k, keys.v))
    start = keys, *zeros, jax.tree.map(jnp.zeros_like, rule), jnp.zeros(queries.q.shape)
    (_, dk, dv, d_rule, dq), _ = lax.scan(step, start, None, devices)
    d_queries, d_keys = jax.tree.map(lambda _: None, (queries, keys))  # none of whole numbers
    d_keys = d_keys._replace(k=dk.astype(keys.k.dtype), v=dv.astype(keys.v.dtype))
    return d_rule, d_queries._replace(q=dq.astype(queries.q.dtype)), d_keys


_round = jax.custom_vjp(_visit, nondiff_argnums=(0, 1))
_round.defvjp(_forward, _backward)
